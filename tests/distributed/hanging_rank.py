"""`train_calm.py` in which rank 1 hangs within the first micro-batch of step 3, once."""

import sys
import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist

from calm_core import config
from calm_core.experiment import Experiment
from calm_core.training import calm
from calm_core.training.launch import run_calm


class HangingTask(calm.CalmTask):
    """CALM, until the samples of step 3."""

    def forward_step(self, micro_batches: Any, model: Any) -> Any:
        """As CALM's, or never."""
        if dist.get_rank() == 1 and self.calls == 8:
            wait_for_ever()
        self.calls += 1
        return super().forward_step(micro_batches, model)

    calls = 0


def wait_for_ever() -> None:
    """Wait for what nobody will do."""
    threading.Event().wait()


if __name__ == "__main__":
    calm.CalmTask = HangingTask
    raise SystemExit(run_calm(config.load(Experiment, Path(sys.argv[1]), sys.argv[2:])))
