"""The metrics of a run in wandb and in TensorBoard. Neither can end a run: one that fails is turned off."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from calm_core.config.training_config import TrainingConfig
from calm_core.io import read_json_lines, write_text

Values = dict[str, Any]


class Tracker(Protocol):
    """A destination of records beside metrics.jsonl."""

    def log(self, step: int, kind: str, values: Values) -> None:
        """Take over the numbers of a record, named KIND/NAME, and the texts of a sample."""

    def finish(self) -> None:
        """Write what is left."""


class Trackers:
    """Those that `training.wandb` and `training.tensorboard` ask for."""

    def __init__(self, folder: Path, start_step: int, name: str, config: TrainingConfig, resolved: Values) -> None:
        """`folder` is that of the run, whose metrics.jsonl holds the records up to `start_step`."""
        self._running: dict[str, Tracker] = {}
        if config.wandb != "disabled":
            self._attempt("wandb", lambda: self._start("wandb", Wandb(folder, name, config, resolved)))
        if config.tensorboard:
            self._attempt("tensorboard", lambda: self._start("tensorboard", TensorBoard(folder, start_step)))

    def log(self, step: int, kind: str, values: Values) -> None:
        """A record, to all of them."""
        for name, tracker in list(self._running.items()):
            self._attempt(name, lambda tracker=tracker: tracker.log(step, kind, values))

    def finish(self) -> None:
        """End all of them."""
        for name, tracker in list(self._running.items()):
            self._attempt(name, tracker.finish)

    def _start(self, name: str, tracker: Tracker) -> None:
        self._running[name] = tracker

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._running.pop(name, None)
            print(f"{name} is off ({error}); metrics.jsonl has everything.", file=sys.stderr)


class Wandb:
    """A run of wandb; an offline one holds all records, also those of earlier starts."""

    def __init__(self, folder: Path, name: str, config: TrainingConfig, resolved: Values) -> None:
        import wandb

        self._run = wandb.init(
            project="calm",
            name=f"{folder.parent.name}/{name}",
            id=_run_id(folder / "wandb_id"),
            resume="allow",
            dir=str(folder),
            mode=config.wandb,
            group=config.wandb_group or None,
            job_type=name,
            config=resolved,
            settings=wandb.Settings(silent=True, console="off", init_timeout=60, x_disable_stats=True),
        )
        if config.wandb == "offline":
            self._repeat(folder / "metrics.jsonl")

    def log(self, step: int, kind: str, values: Values) -> None:
        """The numbers of a record."""
        self._run.log(_numbers(kind, values), step=step)

    def finish(self) -> None:
        """Close the run."""
        self._run.finish()

    def _repeat(self, metrics: Path) -> None:
        """Log the records of earlier starts again.

        Each offline start writes a folder of its own, and `wandb sync` does not append: it replaces the history of the
        run by that of the folder. So the newest folder has to hold the whole run.
        """
        for record in read_json_lines(metrics):
            if record["kind"] != "event":
                values = {name: value for name, value in record.items() if name not in ("step", "kind")}
                self.log(record["step"], record["kind"], values)


class TensorBoard:
    """Event files in the folder `tensorboard` of a run; a resumed run hides what lies after its checkpoint."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def log(self, step: int, kind: str, values: Values) -> None:
        """The numbers of a record, or the text of a sample; events have no curves."""
        if kind == "event":
            return
        if kind == "sample":
            name = f"sample/T={values['temperature']:g} {values['prompt']!r}"
            self._writer.add_text(name, values["prompt"] + values["text"], step)
            return
        for name, number in _numbers(kind, values).items():
            self._writer.add_scalar(name, number, step)
        self._writer.flush()

    def finish(self) -> None:
        """Close the event file."""
        self._writer.close()


def _numbers(kind: str, values: Values) -> dict[str, float]:
    return {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}


def _run_id(path: Path) -> str:
    """The wandb id of this folder, so that a resumed run continues the same wandb run."""
    if not path.exists():
        write_text(path, uuid4().hex[:8])
    return path.read_text()
