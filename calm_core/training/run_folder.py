"""The folder of a training run: `config.yaml`, `metrics.jsonl`, `checkpoints/step-N/`, `logs/`, `wandb/`."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calm_core import config
from calm_core.checkpoint.folder import Checkpoint
from calm_core.errors import UserError

_LOCK = ".lock"

_BEFORE_CONFIG = {_LOCK, "logs", "save", "stop"}  # what may be there of a run that has not come to its configuration


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
        """Hold the folder for this process until the end of the block; the lock dies with the process.

        Raises:
            UserError: if another process trains in this folder, or it holds something else than a run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.config.exists() and any(path.name not in _BEFORE_CONFIG for path in self.path.iterdir()):
            raise UserError(
                f"{self.path} holds something else than a run: move it away or choose another `run` folder."
            )
        with open(self.path / _LOCK, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another run is training in {self.path}: wait for it or choose another `run`."
                ) from error
            yield


def check_same_run(checkpoint: Checkpoint, identity: dict[str, Any], resolved: dict[str, Any]) -> list[str]:
    """Compare a run about to resume with the checkpoint it resumes from.

    Returns:
        One line for each setting that has changed and may.

    Raises:
        UserError: if the model's shape, the data or the seed differ: that would be another run.
    """
    changed = config.differences(checkpoint.state["identity"], identity)
    if changed:
        key, old, new = changed[0]
        raise UserError(
            f"{checkpoint.path} belongs to another run: {key} was {old} and is now {new}; restore it, choose another "
            "`run` folder, or start from these weights by training.init_from."
        )
    return [
        f"resume: {key} was {old}, is now {new}"
        for key, old, new in config.differences(checkpoint.state["config"], resolved)
    ]
