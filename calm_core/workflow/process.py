"""A child process that never outlives its parent."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

from calm_core.errors import ExitCode

BEAT = 5.0  # seconds between the calls of `on_beat`

GRACE = 60.0  # seconds that a process asked to stop has to save its work: torchrun gives its own 30 of them

PR_SET_PDEATHSIG = 1


class StoppedError(Exception):
    """A signal asked this process to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `StoppedError` on SIGINT, SIGTERM and SIGHUP within the block."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedError(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_process(command: Sequence[str], environment: Mapping[str, str], on_beat: Callable[[float], None]) -> int:
    """Run a command with its output where this process's is; its exit code, 1 if a signal killed it.

    `on_beat(seconds so far)` is called every few seconds and at the end. When this process is interrupted, the child is
    asked to stop (SIGTERM: a training saves a checkpoint) and, after a while, killed with all its descendants. When
    this process is killed outright, Linux sends that SIGTERM.
    """
    start = time.monotonic()
    # A session of its own: Ctrl-C at the terminal reaches this process alone, which stops the child in good order.
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, start_new_session=True, preexec_fn=_end_with_parent
    )
    try:
        while process.returncode is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(BEAT)
            on_beat(time.monotonic() - start)
    finally:
        if process.returncode is None:
            _stop(process)
            on_beat(time.monotonic() - start)
    return process.returncode if process.returncode >= 0 else ExitCode.FAILED


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(process: subprocess.Popen) -> None:
    descendants = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for left in descendants:
        with suppress(psutil.NoSuchProcess):
            left.kill()
