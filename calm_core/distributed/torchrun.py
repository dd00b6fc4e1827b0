"""torchrun with a meaningful exit code: `python -m calm_core.distributed.torchrun OPTIONS SCRIPT ARGUMENTS`.

torchrun itself always ends with 1 and a trace if a process failed. Here the exit code is that of the process
that failed first, so that a bad configuration can be distinguished from a failure worth a retry.
"""

import logging
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from calm_core.distributed.topology import LAUNCHER
from calm_core.errors import ExitCode

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)

# Read when CUDA starts: tensor-parallel overlap relies on a single connection that keeps the order of kernels.
ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
# Without it the ranks that --max-restarts starts again read the values of the ranks before them, and fail. Only then:
# with it rank 0 listens on a port that was free a moment ago, and may be another run's by now.
RESTARTING = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def main(arguments: list[str]) -> int:
    """Run torchrun; the exit code.

    SIGTERM, SIGUSR1, SIGHUP and Ctrl-C are passed on to the processes as SIGTERM: those of a training save a checkpoint
    and end, within the half minute that torchrun allows. The exit code is then `STOPPED`. A second Ctrl-C kills them.
    """
    logging.disable(logging.ERROR)  # the processes print their own errors
    options = parse_args(["--signals-to-handle", "SIGQUIT", *arguments])  # the others are handled here
    defaults = ENVIRONMENT | (RESTARTING if options.max_restarts else {})
    os.environ |= {**defaults, **os.environ, LAUNCHER: str(os.getpid())}
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, _stop)
    try:
        run(options)
    except ChildFailedError as failure:
        _, first = failure.get_first_failure()
        return first.exitcode if first.exitcode > 0 else ExitCode.FAILED  # negative: killed by a signal
    except SignalException:
        return ExitCode.STOPPED
    return ExitCode.OK


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Make torchrun end its processes; a further signal must not interrupt it while it does so."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, _kill)
        print("stopping after this step, with a checkpoint; Ctrl-C again ends at once", file=sys.stderr, flush=True)
    raise SignalException(f"signal {number}", sigval=signal.SIGTERM)


def _kill(number: int, frame: FrameType | None) -> NoReturn:
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os._exit(ExitCode.INTERRUPTED)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
