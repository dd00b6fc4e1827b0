"""Ends a run that hangs: every rank writes its stacks, and exits with a code that asks for a retry."""

import faulthandler
import math
import os
import re
import sys
import threading
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from calm_core.errors import ExitCode

# Seconds between the stacks and the exit: the first rank to exit breaks the connections that others hang in, and these
# must write their stacks first.
GRACE = 5.0

_TICK = 1.0

_TITLE = re.compile(r"(\S+) (rank \d+, process \d+: nothing came after .*)")


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
