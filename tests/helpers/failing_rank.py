"""Two ranks of which one fails once: `failing_rank.py start|group|restart`.

`start`: rank 1 refuses before there is a process group. `group`: rank 1 fails while rank 0 waits for it in a
collective. `restart`: as `group`, but only before torchrun has restarted the ranks.
"""

import os
import sys

import torch
import torch.distributed as dist

from calm_core.config import command
from calm_core.config.training_config import ParallelConfig
from calm_core.distributed.topology import distributed
from calm_core.errors import UserError


def work(how: str) -> None:
    """Fail as requested, or sum over the ranks and print it."""
    if how == "start" and os.environ["RANK"] == "1":
        raise UserError("this rank alone refuses: fix it.")
    with distributed(ParallelConfig()) as topology:
        if topology.rank == 1 and (how == "group" or os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"):
            raise RuntimeError("this rank alone fails")
        total = torch.ones(1)
        dist.all_reduce(total)
        topology.say(f"sum {total.item():g}")


if __name__ == "__main__":
    raise SystemExit(command.guard(lambda: work(sys.argv[1])))
