"""Requests to save or to stop, made by a signal or a file, agreed on by all ranks at the same step."""

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


@dataclass(frozen=True)
class Asked:
    """What all ranks have agreed to do after this step."""

    save: bool
    stop: bool


class Requests:
    """Requests made of a running training, from entering the context to leaving it.

    To stop: SIGTERM, SIGUSR1, SIGHUP or Ctrl-C to any rank, or a file `stop` in the run's folder. Schedulers send such
    signals before preemption or a time limit. To save a checkpoint and go on: a file `save` there. A file is removed
    once the request is met. A second Ctrl-C ends the process at once. A signal that is ignored on entry, as SIGHUP
    under nohup, stays ignored.
    """

    def __init__(self, folder: Path) -> None:
        self._signalled = False
        self._save, self._stop = folder / "save", folder / "stop"

    def __enter__(self) -> "Requests":
        handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._on_signal) for number in handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, device: torch.device) -> Asked:
        """What any rank has been asked for. Collective; only rank 0 looks for the files."""
        first = dist.get_rank() == 0
        save, stop = first and self._save.exists(), self._signalled or (first and self._stop.exists())
        asked = torch.tensor([float(save), float(stop)], device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return Asked(*(bool(each) for each in asked.tolist()))

    def met(self, asked: Asked) -> None:
        """Remove the files of requests that are met."""
        if dist.get_rank() == 0:
            for wanted, file in ((asked.save, self._save), (asked.stop, self._stop)):
                if wanted:
                    file.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            with suppress(OSError):  # os.write, because a handler may interrupt a print, which cannot be nested
                os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again ends at once\n")
