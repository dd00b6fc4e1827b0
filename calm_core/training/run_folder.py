"""The folder of a training run: `config.yaml`, `metrics.jsonl`, `checkpoints/step-N/`, `logs/`, `wandb/`."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from calm_core import config
from calm_core.checkpoint.folder import Checkpoint
from calm_core.config.experiment import Experiment
from calm_core.errors import UserError
from calm_core.io import file_lock

_LOCK = ".lock"

_BEFORE_CONFIG = {_LOCK, "logs", "save", "stop"}  # what may exist before the run has written its configuration


class RunFolder:
    """Paths of a run, and the checks that keep two runs out of one folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.config = path / "config.yaml"
        self.logs = path / "logs"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process until the end of the block; the lock ends with the process.

        On a file system without `flock` the run continues without a lock, with a warning.

        Raises:
            UserError: if another process trains in this folder, or it holds something other than a run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.config.exists() and any(path.name not in _BEFORE_CONFIG for path in self.path.iterdir()):
            raise UserError(
                f"{self.path} holds something other than a run: move it away or choose another `run` folder."
            )
        with ExitStack() as stack:
            try:
                stack.enter_context(file_lock(self.path / _LOCK))
            except BlockingIOError as error:
                raise UserError(
                    f"another run is training in {self.path}: wait for it or choose another `run`."
                ) from error
            yield


def check_same_run(
    checkpoint: Checkpoint, identity: dict[str, Any], resolved: dict[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Compare a run about to resume with the checkpoint it resumes from.

    Returns:
        (key, old value, new value) of each setting that has changed and may change; a key that the checkpoint's version
        did not have has changed where it is not the default.

    Raises:
        UserError: if the model's shape, the data or the seed differ: then it is another run.
    """
    changed = config.differences(checkpoint.state["identity"], identity)
    if changed:
        key, old, new = changed[0]
        raise UserError(
            f"{checkpoint.path} belongs to another run: {key} was {old} and is now {new}; restore it, choose another "
            "`run` folder, or start from these weights by training.init_from."
        )
    known = dict(config.flatten(checkpoint.state["config"]))
    usual = dict(config.flatten(config.to_dict(Experiment())))
    changes = config.differences(checkpoint.state["config"], resolved)
    return [change for change in changes if change[0] in known or change[2] != usual.get(change[0])]
