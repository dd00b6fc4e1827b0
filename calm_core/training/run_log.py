"""The folder of a training run, and its metrics: written, tracked, read again and compared.

The folder holds `config.yaml`, `metrics.jsonl`, `checkpoints/step-N/`, `logs/` and `wandb/`. Trackers, wandb and
TensorBoard, show what metrics.jsonl has. They cannot end a run: one that fails is turned off.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from calm_core.config.training_config import TrainingConfig
from calm_core.errors import UserError
from calm_core.io import file_lock, read_json_lines, write_text

Values = dict[str, Any]

_LOCK = ".lock"

_BEFORE_CONFIG = {_LOCK, "logs", "save", "stop"}  # what may exist before the run has written its configuration


@dataclass(frozen=True)
class LineFigure:
    """A figure of a training record other than the loss, its terms and the samples.

    Attributes:
        label: of its curve on the page of the run.
        percent: whether it is a fraction, shown as per cent.
        of_the_machine: whether it depends on the machine, so that equal runs may differ in it.
    """

    label: str
    percent: bool = False
    of_the_machine: bool = False


# By its name in the record; a name that is not here is a term of the loss.
FIGURES = {
    "gradient_norm": LineFigure("gradient norm"),
    "learning_rate": LineFigure("learning rate"),
    "tokens_per_second": LineFigure("tokens/s", of_the_machine=True),
    "mfu": LineFigure("model FLOPs utilisation", percent=True, of_the_machine=True),
    "memory_gib": LineFigure("memory of a rank, GiB", of_the_machine=True),
    "data_wait": LineFigure("time spent waiting for data", percent=True, of_the_machine=True),
    "skipped_updates": LineFigure("updates skipped so far"),
    "spikes": LineFigure("updates skipped as spikes so far"),
}


class RunFolder:
    """Paths of a run, and the checks that keep two runs out of one folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.config = path / "config.yaml"
        self.logs = path / "logs"

    def require_run(self) -> None:
        """Refuse a folder with other contents than a run's.

        Raises:
            UserError: naming it.
        """
        found = self.path.iterdir() if self.path.exists() and not self.config.exists() else ()
        if any(path.name not in _BEFORE_CONFIG for path in found):
            raise UserError(
                f"{self.path} holds something other than a run: move it away or choose another `run` folder."
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process until the end of the block; the lock ends with the process.

        On a file system without `flock` the run continues without a lock, with a warning.

        Raises:
            UserError: if another process trains in this folder, or it holds something other than a run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.require_run()
        with ExitStack() as stack:
            try:
                stack.enter_context(file_lock(self.path / _LOCK))
            except BlockingIOError as error:
                raise UserError(
                    f"another run is training in {self.path}: wait for it or choose another `run`."
                ) from error
            yield


class RunLog:
    """Writes one record per line of metrics.jsonl, and passes it to the trackers.

    A record is {"step": N, "kind": "train" | "eval" | "sample" | "event", name: value, ...}; null is a number that was
    not finite, or is unknown. On a resume the records of steps after the checkpoint are dropped, so there is one record
    of a kind for each step. Events are kept, with the time at which they were written.
    """

    def __init__(
        self, folder: RunFolder, start_step: int, name: str, config: TrainingConfig, resolved: dict[str, Any]
    ) -> None:
        folder.path.mkdir(parents=True, exist_ok=True)
        _drop_after(folder.metrics, start_step)
        self._file = open(folder.metrics, "a")  # noqa: SIM115 - open for the whole run
        self._trackers = Trackers(folder.path, start_step, name, config, resolved)

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Record `values` at `step`."""
        values = finite(values)
        if kind == "event":
            values["time"] = round(time.time(), 3)
        self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._file.flush()
        self._trackers.log(step, kind, values)

    def close(self) -> None:
        """Finish the records."""
        with suppress(OSError):  # each line was flushed when written: an error was raised then
            self._file.close()
        self._trackers.finish()


class Tracker(Protocol):
    """A destination of records besides metrics.jsonl."""

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


def finite(content: Any) -> Any:
    """`content` with None for each number that is not finite, since JSON has neither NaN nor infinity."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_metrics(path: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind in a metrics.jsonl, in order."""
    return [record for record in read_json_lines(path) if record["kind"] == kind]


def is_evaluated(metrics: Path, step: int) -> bool:
    """Whether there is a record of an evaluation of this step."""
    return any(record["step"] == step for record in read_metrics(metrics, "eval"))


def _drop_after(metrics: Path, step: int) -> None:
    """Keep all events, and the other records up to `step`, which a checkpoint holds."""
    if not metrics.exists():
        return
    kept = [record for record in read_json_lines(metrics) if record["kind"] == "event" or record["step"] <= step]
    write_text(metrics, "".join(json.dumps(record) + "\n" for record in kept))


def samples_of_step(run: Path, step: int) -> range:
    """The global indices of the samples of training step `step`, counted from 1.

    Every start and resume of a run records its step, the samples consumed and the global batch from then on, so changes
    of the batch size are accounted for.

    Raises:
        UserError: if the run has not reached that step.
    """
    done = max((record["step"] for record in read_metrics(run / "metrics.jsonl", "train")), default=0)
    starts = [event for event in read_metrics(run / "metrics.jsonl", "event") if event["event"] == "start"]
    before = [start for start in starts if start["step"] < step]
    if not before or step > done:
        raise UserError(f"{run} has recorded steps 1 to {done}, not {step}: choose another --step.")
    start = before[-1]
    first = start["samples"] + (step - 1 - start["step"]) * start["global_batch"]
    return range(first, first + start["global_batch"])


KINDS = ("train", "eval")


@dataclass(frozen=True)
class Difference:
    """The first difference of two runs: `ours` and `theirs` are the values of `key`, None if absent."""

    step: int
    kind: str
    key: str
    ours: Any
    theirs: Any


def first_difference(one: Path, other: Path, tolerance: float) -> Difference | None:
    """The first difference between the metrics of two run folders, None if they agree at all common steps.

    Args:
        one: folder of a training run.
        other: likewise.
        tolerance: largest relative difference of numbers that agree.

    Raises:
        UserError: if a folder holds no metrics, or the runs have no step in common.
    """
    ours, theirs = _records(one), _records(other)
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise UserError(f"{one} and {other} have no recorded step in common: set the same training.log_every.")
    found = (
        Difference(step, KINDS[kind], *values)
        for step, kind in common
        for values in _differing(ours[step, kind], theirs[step, kind], tolerance)
    )
    return next(found, None)


def _records(run: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """The records by step, then kind."""
    path = run / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{run} holds no metrics.jsonl: give the folder of a training run, such as runs/demo/calm.")
    return {(r["step"], number): r for number, kind in enumerate(KINDS) for r in read_metrics(path, kind)}


def _differing(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> Iterator[tuple[str, Any, Any]]:
    for key in [*one, *(key for key in other if key not in one)]:
        ours, theirs = one.get(key), other.get(key)
        if not (key in FIGURES and FIGURES[key].of_the_machine) and not _agree(ours, theirs, tolerance):
            yield key, ours, theirs


def _agree(one: Any, other: Any, tolerance: float) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=tolerance)
    return one == other
