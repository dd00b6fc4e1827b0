"""A rank that works until it is asked to stop, as a training does: `waiting_rank.py FOLDER`.

It leaves FOLDER/ready-RANK when it has begun, and FOLDER/saved-RANK when it has stopped on request.
"""

import os
import sys
import time
from pathlib import Path

from calm_core.config import command
from calm_core.config.parallel_config import ParallelConfig
from calm_core.distributed.topology import distributed
from calm_core.errors import ExitCode


def work(folder: Path) -> ExitCode:
    """Wait for a request to stop."""
    with distributed(ParallelConfig()) as topology:
        from calm_core.training.signals import Requests

        with Requests(folder) as requests:
            (folder / f"ready-{topology.rank}").write_text(str(os.getpid()))
            while not requests.agreed(topology.device).stop:
                time.sleep(0.05)
            (folder / f"saved-{topology.rank}").touch()
    return ExitCode.STOPPED


if __name__ == "__main__":
    raise SystemExit(command.guard(lambda: work(Path(sys.argv[1]))))
