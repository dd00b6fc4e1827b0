"""`train_calm.py` with a fault in rank 1: `faulty_rank.py hang|spike|die|stale CONFIG [key=value ...]`.

`hang`: it never returns from the first micro-batch of step 3. `spike`: its loss in step 7 is fifty times too large.
`die`: it is killed when step 5 is done and step 6 has not begun. The faults count this process's micro-batches, two a
step. `stale`: it sees no checkpoints, as on a file system that shows new files late.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist

from calm_core import config
from calm_core.config.experiment import Experiment
from calm_core.training import calm_task as calm
from calm_core.training import checks, resume
from calm_core.training.launch import run_calm

MICRO_BATCHES = 2  # a step


class FaultyTask(calm.CalmTask):
    """CALM, except in one step of rank 1."""

    fault = ""
    calls = 0

    def forward_step(self, micro_batches: Any, model: Any) -> Any:
        """As CALM's, or with the fault."""
        step = self.calls // MICRO_BATCHES + 1 if dist.get_rank() == 1 else 0
        self.calls += 1
        if self.fault == "hang" and step == 3:
            wait_for_ever()
        if self.fault == "die" and step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        output, loss_of = super().forward_step(micro_batches, model)
        return output, spiked(loss_of) if self.fault == "spike" and step == 7 else loss_of


def wait_for_ever() -> None:
    """Wait for what nobody will do."""
    threading.Event().wait()


def spiked(loss_of: Any) -> Any:
    """The function of the output that makes fifty times the loss of it."""

    def loss(output: Any) -> Any:
        value, metrics = loss_of(output)
        return value * 50, metrics | {"loss": value.detach() * 50}

    return loss


def see_no_checkpoints() -> None:
    """Let the start of a run find no checkpoint in any folder."""
    for module in (checks, resume):
        module.list_checkpoints = lambda folder: []


if __name__ == "__main__":
    FaultyTask.fault = sys.argv[1]
    if FaultyTask.fault == "stale" and os.environ["RANK"] == "1":
        see_no_checkpoints()
    calm.CalmTask = FaultyTask
    raise SystemExit(run_calm(config.load(Experiment, Path(sys.argv[2]), sys.argv[3:])))
