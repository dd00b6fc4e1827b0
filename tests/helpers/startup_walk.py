"""What a rank draws and reads when a run starts and resumes: `OUT` takes RANK.json with the numbers of both."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from calm_core.checkpoint import load as checkpoint
from calm_core.checkpoint.folder import open_checkpoint
from calm_core.checkpoint.tensor_folder import TensorFolder
from calm_core.config.model_config import BackboneConfig, HeadConfig, ModelShape
from calm_core.config.training_config import OptimizerConfig, ParallelConfig
from calm_core.distributed.engine import Engine
from calm_core.distributed.topology import Topology, distributed
from calm_core.model import parameters
from calm_core.model.backbone import transformer_config
from calm_core.model.calm import CalmModel

SHAPE = ModelShape(
    BackboneConfig(layers=4, hidden=64, ffn=160, heads=4), HeadConfig(samples=2), vocabulary=256, k=4, latent=16
)


def figures(folder: Path, topology: Topology) -> dict[str, int | bool]:
    """Parameters of the model, those that this rank has filled at the start, and the bytes it has read on resuming."""
    filled, read = [], []
    fill, read_box = parameters._initialize, TensorFolder.read

    def counted_fill(piece, local, *arguments) -> None:
        filled.append(local.numel())
        fill(piece, local, *arguments)

    def counted_read(self, name, box=None) -> torch.Tensor:
        found = read_box(self, name, box)
        read.append(found.nbytes)
        return found

    parameters._initialize, TensorFolder.read = counted_fill, counted_read
    try:
        first, second = (engine_of(topology, seed) for seed in (0, 1))
        saved = checkpoint.save(folder, 1, first, {"updates": 1}, keep=1)
        checkpoint.load(open_checkpoint(saved), second)
    finally:
        parameters._initialize, TensorFolder.read = fill, read_box
    pairs = zip(first.model_parts[0].parameters(), second.model_parts[0].parameters(), strict=True)
    return {
        "parameters": sum(p.numel() for p in first.model_parts[0].parameters()),
        "filled": sum(filled) // 2,
        "read": sum(read),
        "equal": all(torch.equal(a, b) for a, b in pairs),
    }


def engine_of(topology: Topology, seed: int) -> Engine:
    """A model in bf16 with its optimizer."""
    model = CalmModel(transformer_config(SHAPE.backbone, topology.layout, torch.bfloat16), SHAPE)
    parameters.initialize([model], 0.02, seed)
    return Engine([model], OptimizerConfig(), topology)


def main() -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    out = Path(sys.argv[1])
    with distributed(ParallelConfig()) as topology:
        (out / f"{topology.rank}.json").write_text(json.dumps(figures(out / "checkpoints", topology)))


if __name__ == "__main__":
    main()
