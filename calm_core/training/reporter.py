"""What a person and a file learn of a run while it goes on."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from calm_core.checkpoint.save import Saved
from calm_core.config.training_config import TrainingConfig
from calm_core.distributed.engine import Update
from calm_core.distributed.topology import Topology
from calm_core.report.run_page import write_run_page
from calm_core.training.hardware import backends, peak_flops, peak_memory
from calm_core.training.resume import Progress
from calm_core.training.run_folder import RunFolder
from calm_core.training.run_log import RunLog
from calm_core.training.spikes import Verdict
from calm_core.training.task import Task

T = TypeVar("T")

LAYOUT = ("tensor", "pipeline", "virtual", "sequence", "recompute")  # of the configuration, recorded at each start


class Reporter:
    """Times the steps and reports them on rank 0; on other ranks it only takes part in what is collective."""

    def __init__(
        self,
        task: Task,
        config: TrainingConfig,
        topology: Topology,
        folder: RunFolder,
        start: Progress,
        dtype: torch.dtype,
        resolved: dict[str, Any],
    ) -> None:
        self._task, self._config, self._topology, self._folder = task, config, topology, folder
        dist.barrier()  # so that ranks that share a machine measure its peak together
        peak, source = peak_flops(topology.device, dtype)
        self._peak = peak * topology.world
        self._log = None
        if topology.rank == 0:
            precision = str(dtype).removeprefix("torch.")
            self._log = RunLog(folder, start.step, task.name, config, resolved)
            how = {"global_batch": config.global_batch, "ranks": topology.world, "precision": precision}
            how |= {name: getattr(topology.layout, name) for name in LAYOUT}
            how |= {"data": topology.data_size, "stages": task.stages}
            self._log.write(start.step, "event", {"event": "start", "samples": start.consumed, **how})
            print(backends(topology.device))
            print(f"peak: {self._peak / 1e12:.3g} TFLOP/s over {topology.world} ranks ({source}, {precision})")
        self._reached = start.step
        self._since = time.perf_counter()
        self._steps = 0
        self._wait = 0.0
        self._stood = 0.0

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log is not None:
            if error is not None:
                with suppress(OSError):  # a full disk may be that very error
                    self.ended("failed", reason=f"{type(error).__name__}: {error}")
            self._log.close()
            self._write_page()

    def waited(self, load: Callable[[], T]) -> T:
        """Call `load` and count the time as waiting for data."""
        start = time.perf_counter()
        result = load()
        self._wait += time.perf_counter() - start
        return result

    def step(self, progress: Progress, metrics: dict[str, float], update: Update, learning_rate: float) -> None:
        """Record the step just done when its turn has come, or when its update was refused."""
        self._steps += 1
        self._reached = step = progress.step
        if self._log is None or not (
            step % self._config.log_every == 0 or step == self._config.steps or not update.applied
        ):
            return
        seconds = (time.perf_counter() - self._since) / self._steps
        samples = self._config.global_batch
        values = {
            **metrics,
            "gradient_norm": update.gradient_norm,
            "learning_rate": learning_rate,
            "samples": progress.consumed,
            "tokens_per_second": samples * self._task.tokens_per_sample / seconds,
            "mfu": samples * self._task.flops_per_sample / seconds / self._peak,
            "memory_gib": peak_memory(self._topology.device) / 2**30,
            "data_wait": self._wait / self._steps / seconds,
            "skipped_updates": step - progress.updates,
            "spikes": progress.spikes,
        }
        self._log.write(step, "train", values)
        print(self._line(step, values, seconds), flush=True)
        if not update.applied:
            self._refused(progress, Verdict(update.answer))
        self._restart_clock()

    def evaluation(self, step: int, metrics: dict[str, Any], texts: list[dict[str, Any]]) -> None:
        """Record an evaluation and what the model said; their time is not counted as training."""
        if self._log is not None:
            self._log.write(step, "eval", metrics)
            for text in texts:
                self._log.write(step, "sample", text)
            shown = "  ".join(_shown(name, value, metrics) for name, value in metrics.items() if _is_shown(name, value))
            print(f"{self._task.name} step {step} held-out: {shown}", flush=True)
            self._write_page()
        self._restart_clock()

    def saving(self, step: int, work: Callable[[], Saved | None]) -> None:
        """Do a part of a save; once a checkpoint is complete, record it and how long training stood still for it."""
        start = time.perf_counter()
        saved = work()
        stood = time.perf_counter() - start
        self._stood += stood
        self._since += stood  # not counted as training
        if saved is not None:
            if self._log is not None:
                times = {"seconds": saved.seconds, "stall": self._stood}
                self._log.write(step, "event", {"event": "checkpoint", "saved": saved.step, **times})
            self._stood = 0.0

    def ended(self, how: str, **details: str) -> None:
        """Record how the run ends: "stopped" on request, "finished", or "failed"; a later start tells by it."""
        if self._log is not None:
            self._log.write(self._reached, "event", {"event": how, **details})

    def _write_page(self) -> None:
        """Bring RUN/report.html up to date."""
        try:
            write_run_page(self._folder.path.parent)
        except Exception as error:  # a page must not take the run with it
            print(f"the page of the run was not written ({error}); metrics.jsonl has everything.", file=sys.stderr)

    def _refused(self, progress: Progress, verdict: Verdict) -> None:
        """Record the documents behind an update that was left out."""
        samples = np.arange(progress.consumed - self._config.global_batch, progress.consumed)
        what = {"event": "refused", "reason": verdict.name.lower(), "documents": self._task.documents(samples)}
        self._log.write(progress.step, "event", what)
        print(f"{self._task.name} step {progress.step}: update left out ({what['reason']})", flush=True)

    def _restart_clock(self) -> None:
        self._since, self._steps, self._wait = time.perf_counter(), 0, 0.0

    def _line(self, step: int, values: dict[str, float], seconds: float) -> str:
        left = round((self._config.steps - step) * seconds)
        return (
            f"{self._task.name} step {step}/{self._config.steps}  loss {values['loss']:.4f}  "
            f"norm {values['gradient_norm']:.3f}  lr {values['learning_rate']:.2e}  "
            f"{values['tokens_per_second'] / 1e3:.1f}k tokens/s  mfu {values['mfu']:.1%}  "
            f"mem {values['memory_gib']:.2f} GiB  data wait {values['data_wait']:.1%}  "
            f"eta {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        )


def _is_shown(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and not name.endswith("_error") and not name.startswith("variance_")


def _shown(name: str, value: float, metrics: dict[str, Any]) -> str:
    error = metrics.get(f"{name}_error")
    return f"{name} {value:.4g}" + (f" ± {error:.2g}" if error is not None else "")
