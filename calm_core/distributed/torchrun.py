"""torchrun with a telling exit code: `python -m calm_core.distributed.torchrun OPTIONS SCRIPT ARGUMENTS`.

torchrun itself ends with 1 and a trace whatever became of its processes. Here the code is that of the process that
failed first, so that bad configuration is told from a failure worth a retry.
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from calm_core.errors import ExitCode

INTERRUPTED = 128 + signal.SIGINT  # what a shell calls it


def main(arguments: list[str]) -> int:
    """Run torchrun; the exit code. A signal that asks it to end is passed on, with half a minute for the processes.

    Those of a training save a checkpoint then: after anything but Ctrl-C the code is that of a run stopped on request.
    """
    logging.disable(logging.ERROR)  # the processes speak for themselves
    try:
        run(parse_args(arguments))
    except ChildFailedError as failure:
        _, first = failure.get_first_failure()
        return first.exitcode if first.exitcode > 0 else ExitCode.FAILED  # negative: killed by a signal
    except SignalException as stopped:
        return INTERRUPTED if stopped.sigval == signal.SIGINT else ExitCode.STOPPED
    return ExitCode.OK


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
