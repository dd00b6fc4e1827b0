"""What a training imports, and what it does not."""

import sys

from launching import finish

IMPORTS = """
import sys, torch
compile = torch.compile
import calm_core.checkpoint.load, calm_core.distributed.engine, calm_core.training.calm_task, calm_core.training.launch
from calm_core.megatron import parallel_state
assert torch.compile is compile
costly = {"torch._dynamo", "torch._inductor", "wandb", "megatron.core", "deepspeed"}
print("imported", sorted(costly & set(sys.modules)))
import wandb, torch.utils.tensorboard
torch.compile(lambda x: x)
print("imported", sorted(costly & set(sys.modules)))
"""


def test_a_training_imports_neither_a_compiler_nor_wandb_before_it_uses_them() -> None:
    code, output = finish([sys.executable, "-W", "ignore", "-c", IMPORTS], seconds=100)
    assert code == 0, output
    before, after = (line for line in output.splitlines() if line.startswith("imported"))
    assert before == "imported ['deepspeed', 'megatron.core']"
    assert after == "imported ['deepspeed', 'megatron.core', 'torch._dynamo', 'torch._inductor', 'wandb']"
