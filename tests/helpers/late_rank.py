"""Two ranks ask for the newest checkpoint of a run, which rank 1 does not see yet: `late_rank.py`."""

from pathlib import Path

import torch.distributed as dist

from calm_core.config.training_config import ParallelConfig
from calm_core.distributed.topology import Topology, distributed
from calm_core.evaluation import checkpoint


def work(topology: Topology) -> None:
    """Print what each rank takes."""
    checkpoint.find_checkpoint = lambda run: run / f"step-{2 - topology.rank}"
    taken = [None] * topology.world
    dist.all_gather_object(taken, checkpoint._newest(Path("run"), lambda found: found.name))
    topology.say(f"taken: {taken}")


if __name__ == "__main__":
    with distributed(ParallelConfig()) as topology:
        work(topology)
