"""Requests to save or to stop a run, by a signal or a file, and the watchdog, which ends a run that hangs."""

import faulthandler
import math
import os
import re
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

import torch
import torch.distributed as dist

from calm_core.errors import ExitCode

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)

# Seconds between the stacks and the exit: the first rank to exit breaks the connections that others hang in, and these
# must write their stacks first.
GRACE = 5.0

_TICK = 1.0

_TITLE = re.compile(r"(\S+) (rank \d+, process \d+: nothing came after .*)")


@dataclass(frozen=True)
class Asked:
    """What all ranks have agreed to do after this step."""

    save: bool
    stop: bool


class Requests:
    """Requests made of a running training, from entering the context to leaving it.

    To stop: SIGTERM, SIGUSR1, SIGHUP or Ctrl-C to any rank, or a file `stop` in the run's folder. Schedulers send such
    signals before preemption or a time limit. To save a checkpoint and continue: a file `save` there. A file is removed
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


class Watchdog:
    """Ends this process when `alive` has not been called for too long.

    Every rank has one, so every rank of a hung collective writes its stacks; if one cannot (stopped, or its machine
    lost), the others still end. The stacks of all threads go to stderr and to `stacks-rank-R.txt`.

    A Python thread watches. If a library call hangs without releasing the interpreter lock, faulthandler's timer writes
    the same stacks after twice the time, to stderr only and with exit code 1.

    Args:
        first_minutes: allowed before the first `alive`; a start reads a checkpoint and first batches, and compiles.
        minutes: allowed from one `alive` to the next; 0 turns the watchdog off.
        rank: of this process.
        logs: folder of the stacks, made when there are any.
    """

    def __init__(self, first_minutes: float, minutes: float, rank: int, logs: Path) -> None:
        self._minutes, self._rank, self._logs = minutes, rank, logs
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._expect("the start", first_minutes)

    def __enter__(self) -> "Watchdog":
        if self._minutes > 0:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._minutes > 0:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def alive(self, done: str) -> None:
        """Restart the timer, because `done` has happened."""
        self._expect(done, self._minutes)

    def _expect(self, done: str, minutes: float) -> None:
        self._state = (done, time.monotonic(), 60 * minutes)  # one assignment: the thread reads it whole

    def _watch(self) -> None:
        while True:
            done, since, limit = self._state
            if time.monotonic() - since > limit:
                self._end(done, limit)
            faulthandler.dump_traceback_later(2 * limit, exit=True, file=sys.__stderr__)
            if self._over.wait(min(_TICK, limit / 4)):
                return

    def _end(self, done: str, limit: float) -> NoReturn:
        time_now = datetime.now(UTC).isoformat(timespec="seconds")
        title = f"{time_now} rank {self._rank}, process {os.getpid()}: nothing came after {done} for {limit:g} s"
        path = self._logs / f"stacks-rank-{self._rank}.txt"
        try:
            print(f"watchdog: {title}; the stacks of all threads, also in {path}:", file=sys.__stderr__, flush=True)
            faulthandler.dump_traceback(sys.__stderr__)
            self._logs.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                print(title, file=file, flush=True)
                faulthandler.dump_traceback(file)
            time.sleep(GRACE)
        finally:
            os._exit(ExitCode.WATCHDOG)  # a clean exit would hang as well


def stacks(logs: Path) -> list[Path]:
    """The files that the watchdogs of a run have written."""
    return sorted(logs.glob("stacks-rank-*.txt"))


def hangs(logs: Path) -> list[tuple[float, str]]:
    """The time of each hang of a run, in seconds since 1970, and the title written by its first rank; oldest first.

    The ranks of one hang write their stacks within a few seconds of each other.
    """
    found = (_TITLE.fullmatch(line) for path in stacks(logs) for line in path.read_text().splitlines())
    titles = sorted((datetime.fromisoformat(title[1]).timestamp(), title[2]) for title in found if title)
    return [this for before, this in pairwise([(-math.inf, ""), *titles]) if this[0] - before[0] > 2 * GRACE]
