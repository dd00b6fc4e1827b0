"""Reports a run in progress to the terminal, to metrics.jsonl and to wandb."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from calm_core.checkpoint.save import Saved
from calm_core.config.load_config import CHECKOUT
from calm_core.config.training_config import TrainingConfig
from calm_core.distributed.collectives import meet
from calm_core.distributed.engine import Engine
from calm_core.distributed.optimizer import Update
from calm_core.training.hardware import backends, device_name, peak_flops, peak_memory
from calm_core.training.resume import RunProgress
from calm_core.training.run_log import RunFolder, RunLog
from calm_core.training.task import Task

LAYOUT = ("tensor", "pipeline", "virtual", "sequence", "recompute")  # configuration keys recorded at each start


class Window:
    """The steps since the last line of metrics, and the time they took."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.waited = 0.0
        self.paused = 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Mean seconds of a step, without pauses."""
        return (time.perf_counter() - self._started - self.paused) / len(self.metrics)

    @property
    def data_wait(self) -> float:
        """The fraction of the time spent waiting for data."""
        return self.waited / len(self.metrics) / self.seconds

    def means(self) -> dict[str, float]:
        """The mean of each metric over the steps that have it: a token loss may end between two lines."""
        values: dict[str, list[float]] = {}
        for step in self.metrics:
            for name, value in step.items():
                values.setdefault(name, []).append(value)
        return {name: sum(of) / len(of) for name, of in values.items()}


class Reporter:
    """Reports steps, evaluations and events on rank 0; other ranks only take part in collective calls.

    A line of metrics has the means of loss, its terms and gradient norm over the steps since the last line; learning
    rate and counts are those of the step it names.
    """

    def __init__(
        self,
        task: Task,
        config: TrainingConfig,
        folder: RunFolder,
        engine: Engine,
        start: RunProgress,
        resolved: dict[str, Any],
        write_page: Callable[[Path], object] | None,
    ) -> None:
        self._task, self._config, self._folder, self._engine = task, config, folder, engine
        self._topology, self._write = engine.topology, write_page
        parameters = engine.parameter_count()
        meet(self._topology.device)  # ranks that share a machine measure its peak at the same time
        peak, source = peak_flops(self._topology.device, engine.dtype)
        self._peak: float | None = peak * self._topology.world
        self._log = None
        if self._topology.rank == 0:
            self._log = RunLog(folder, start.step, task.name, config, resolved)
            where = {"parameters": parameters, "hardware": device_name(self._topology.device), "commit": commit()}
            beginning = {"event": "start", "samples": start.consumed, **where, **self._layout()}
            self._log.write(start.step, "event", beginning)
            print(self._start_line(parameters))
            print(backends(self._topology.device, self._topology.layout))
            print(f"peak: {self._peak / 1e12:.3g} TFLOP/s over {self._topology.world} ranks ({source})", flush=True)
        self._reached = start.step
        self._window = Window()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log is not None:
            if error is not None:
                with suppress(OSError):  # the error may be a full disk
                    self.ended("failed", reason=f"{type(error).__name__}: {error}")
            self._log.close()
            self._write_page()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time of the block does not count as training."""
        began = time.perf_counter()
        yield
        self._window.paused += time.perf_counter() - began

    def step(
        self, progress: RunProgress, metrics: dict[str, float], update: Update, learning_rate: float, waited: float
    ) -> None:
        """Record the step just done, if a line is due or its update was skipped.

        Args:
            progress: after the step.
            metrics: the loss and its terms.
            update: the outcome of the optimizer's step.
            learning_rate: of the step.
            waited: seconds it waited for its batch.
        """
        self._reached = step = progress.step
        if self._log is None:
            return
        self._window.metrics.append({**metrics, "gradient_norm": update.gradient_norm})
        self._window.waited += waited
        if step % self._config.log_every == 0 or step == self._config.steps or not update.applied:
            values = self._line_of(progress, learning_rate)
            self._log.write(step, "train", values)
            print(self._text(step, values), flush=True)
            self._window = Window()
        if not update.applied:
            self._skipped(progress, metrics["loss"], update)

    def evaluation(self, step: int, metrics: dict[str, Any], texts: list[dict[str, Any]]) -> None:
        """Record an evaluation and continuations."""
        if self._log is not None:
            self._log.write(step, "eval", metrics)
            for text in texts:
                self._log.write(step, "sample", text)
            shown = "  ".join(_shown(name, value, metrics) for name, value in metrics.items() if _is_shown(name, value))
            print(f"{self._task.name} step {step} held-out: {shown}", flush=True)
            self._write_page()

    def saved(self, step: int, checkpoints: Sequence[Saved]) -> None:
        """Record checkpoints that are now complete."""
        for saved in checkpoints if self._log is not None else ():
            times = {"seconds": saved.seconds, "stall": saved.stall}
            self._log.write(step, "event", {"event": "checkpoint", "saved": saved.step, **times})

    def ended(self, how: str, **details: str) -> None:
        """Record how the run ends: "stopped" on request, "finished" or "failed"."""
        if self._log is not None:
            self._log.write(self._reached, "event", {"event": how, **details})

    def _layout(self) -> dict[str, Any]:
        layout = {"global_batch": self._config.global_batch, "ranks": self._topology.world}
        layout |= {"precision": str(self._engine.dtype).removeprefix("torch.")}
        layout |= {name: getattr(self._topology.layout, name) for name in LAYOUT}
        return layout | {"data": self._topology.data_size, "stages": self._task.stages}

    def _start_line(self, parameters: int) -> str:
        config, layout, precision = self._config, self._topology.layout, str(self._engine.dtype).removeprefix("torch.")
        tokens = config.global_batch * self._task.tokens_per_sample
        return (
            f"{self._task.name}: {self._task.summary}, {_count(parameters)} parameters; {config.steps:,} steps of "
            f"{_count(tokens)} tokens = {_count(config.steps * tokens)}; {device_name(self._topology.device)}, "
            f"{precision}; {self._topology.world} ranks = tensor {layout.tensor} x "
            f"pipeline {layout.pipeline} x data {self._topology.data_size}"
        )

    def _line_of(self, progress: RunProgress, learning_rate: float) -> dict[str, Any]:
        """The values of a line of metrics."""
        seconds, samples = self._window.seconds, self._config.global_batch
        history = self._engine.optimizer.detector.history
        return {
            **self._window.means(),
            "learning_rate": learning_rate,
            "samples": progress.consumed,
            "tokens_per_second": samples * self._task.tokens_per_sample / seconds,
            "mfu": self._mfu(samples * self._task.flops_per_sample / seconds),
            "memory_gib": peak_memory(self._topology.device) / 2**30,
            "data_wait": self._window.data_wait,
            "skipped_updates": progress.step - history.updates,
            "spikes": history.spikes,
        }

    def _mfu(self, flops: float) -> float | None:
        """`flops` per second as a fraction of the peak; None once the measured peak has turned out to be too low."""
        if self._peak is not None and flops > self._peak:
            print(
                f"mfu: unknown, since training exceeds the peak of {self._peak / 1e12:.3g} TFLOP/s, which was measured "
                "while the machine was busy",
                file=sys.stderr,
            )
            self._peak = None
        return None if self._peak is None else flops / self._peak

    def _skipped(self, progress: RunProgress, loss: float, update: Update) -> None:
        """Record a skipped update and the documents of its samples."""
        samples = np.arange(progress.consumed - self._config.global_batch, progress.consumed)
        reason, documents = update.verdict.name.lower(), self._task.documents(samples)
        details = {"reason": reason, "loss": loss, "gradient_norm": update.gradient_norm, "documents": documents}
        self._log.write(progress.step, "event", {"event": "refused", **details})
        print(f"{self._task.name} step {progress.step}: update skipped ({reason})", flush=True)

    def _write_page(self) -> None:
        """Update the page of the run."""
        if self._write is None:
            return
        try:
            self._write(self._folder.path.parent)
        except Exception as error:  # a page must not end the run
            print(f"the page of the run was not written ({error}); metrics.jsonl has everything.", file=sys.stderr)

    def _text(self, step: int, values: dict[str, Any]) -> str:
        left = round((self._config.steps - step) * self._window.seconds)
        mfu = "unknown" if values["mfu"] is None else f"{values['mfu']:.1%}"
        return (
            f"{self._task.name} step {step}/{self._config.steps}  loss {values['loss']:.4f}  "
            f"norm {values['gradient_norm']:.3f}  lr {values['learning_rate']:.2e}  "
            f"{values['tokens_per_second'] / 1e3:.1f}k tokens/s  mfu {mfu}  "
            f"mem {values['memory_gib']:.2f} GiB  data wait {values['data_wait']:.1%}  "
            f"eta {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        )


def commit() -> str:
    """The commit of this code, with "-dirty" if files have changed since; nothing outside a clone."""
    if not (CHECKOUT / ".git").exists():
        return ""
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _count(number: float) -> str:
    """A count with three digits and a unit."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.0f}"


def _is_shown(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and not name.endswith("_error") and not name.startswith("variance_")


def _shown(name: str, value: float, metrics: dict[str, Any]) -> str:
    error = metrics.get(f"{name}_error")
    return f"{name} {value:.4g}" + (f" ± {error:.2g}" if error is not None else "")
