"""A rank that works until it is asked to stop, as a training does: `waiting_rank.py FOLDER`.

It leaves FOLDER/ready-RANK when it has begun, and FOLDER/saved-RANK when it has stopped on request.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from calm_core.config import command
from calm_core.distributed.topology import end_with_launcher
from calm_core.errors import ExitCode
from calm_core.training.stopping import Requests


def work(folder: Path) -> ExitCode:
    """Wait for a request to stop."""
    end_with_launcher()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with Requests(folder) as requests:
        (folder / f"ready-{rank}").write_text(str(os.getpid()))
        while not requests.agreed(torch.device("cpu")).stop:
            time.sleep(0.05)
        (folder / f"saved-{rank}").touch()
    return ExitCode.STOPPED


if __name__ == "__main__":
    raise SystemExit(command.guard(lambda: work(Path(sys.argv[1]))))
