"""A child process that never outlives its parent."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType

import psutil

from calm_core.errors import ExitCode

REPORT_SECONDS = 5.0  # between calls of `on_progress`

# A process asked to stop has this long to save its work; torchrun gives its own children 30 s.
STOP_SECONDS = 60.0

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


def until_stopped(work: Callable[[], int]) -> int:
    """Call `work`, which resumes when it is called again; its exit code, or STOPPED after a signal."""
    try:
        with stoppable():
            return work()
    except StoppedError as stopped:
        print(f"stopped by {stopped}; run the same command again to continue")
        return ExitCode.STOPPED


def run_process(command: Sequence[str], environment: Mapping[str, str], on_progress: Callable[[float], None]) -> int:
    """Run a command that writes to this process's output; its exit code, 1 if a signal killed it.

    `on_progress(seconds so far)` is called every few seconds and at the end. When this process is interrupted, the
    child is asked to stop (SIGTERM: a training saves a checkpoint) and, after a while, killed with all its descendants.
    When this process is killed outright, Linux sends that SIGTERM.
    """
    start = time.monotonic()
    # In its own session: Ctrl-C at the terminal reaches this process alone, which then stops the child cleanly.
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        start_new_session=True,
        preexec_fn=partial(_end_with_parent, os.getpid()),
    )
    try:
        while process.returncode is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(REPORT_SECONDS)
            on_progress(time.monotonic() - start)
    finally:
        if process.returncode is None:
            _stop(process)
            on_progress(time.monotonic() - start)
    return process.returncode if process.returncode >= 0 else ExitCode.FAILED


def _end_with_parent(parent: int) -> None:
    """Have Linux send SIGTERM to this process when its parent ends; end at once if the parent has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)  # nothing has started yet; SIGTERM could meet a handler of the parent


def _stop(process: subprocess.Popen) -> None:
    descendants = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for descendant in descendants:
        with suppress(psutil.NoSuchProcess):
            descendant.kill()
