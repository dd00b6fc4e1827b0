"""Trains two steps in several layouts and writes the peak of live tensor bytes beside the plan's: `OUT NAME...`.

OUT/NAME-RANK.json takes `predicted`, `measured`, and the parameters of the rank by plan and by count.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from live_bytes import LiveBytes, storages

from calm_core.config.experiment import PlanConfig
from calm_core.config.model_config import BackboneConfig, HeadConfig, ModelShape, TokenLossConfig
from calm_core.config.training_config import ParallelConfig, TrainingConfig
from calm_core.distributed.topology import Topology, distributed
from calm_core.model.noise import SampleNoise
from calm_core.plan.account import account
from calm_core.plan.layout import pipeline_split

BACKBONE = BackboneConfig(layers=4, hidden=128, ffn=344, heads=4, kv_groups=2)
ENERGY = ModelShape(BACKBONE, HeadConfig(samples=8, target_samples=32), vocabulary=1000, k=4, latent=32)
TRAINING = TrainingConfig(global_batch=16, micro_batch=4, positions=64, precision="fp32")


def of(kind: str) -> ModelShape:
    return replace(
        ENERGY, head=HeadConfig(kind), k=1 if kind == "softmax" else 4, latent=0 if kind == "softmax" else 32
    )


RUNS = {
    "single": (ENERGY, ParallelConfig()),
    "full": (ENERGY, ParallelConfig(recompute="full")),
    "selective": (ENERGY, ParallelConfig(recompute="selective")),
    "softmax": (of("softmax"), ParallelConfig()),
    "flow": (of("flow"), ParallelConfig()),
    "diffusion": (of("diffusion"), ParallelConfig()),
    "dp2": (ENERGY, ParallelConfig()),
    "tp2": (ENERGY, ParallelConfig(tensor=2)),
    "tp2-sp": (ENERGY, ParallelConfig(tensor=2, sequence=True)),
    "tokens": (replace(ENERGY, token_loss=TokenLossConfig(weight=1.0, rank=16)), ParallelConfig()),
    "full-rank": (replace(ENERGY, token_loss=TokenLossConfig(weight=1.0)), ParallelConfig()),
    "tp2-sp-softmax": (of("softmax"), ParallelConfig(tensor=2, sequence=True)),
    "pp2": (ENERGY, ParallelConfig(pipeline=2)),
    "pp2-virtual2": (ENERGY, ParallelConfig(pipeline=2, virtual=2)),
}


def run(shape: ModelShape, topology: Topology) -> dict[str, int]:
    """Predicted and measured peak of a step, and parameters, of this rank."""
    from calm_core.distributed.engine import Engine, Pass
    from calm_core.megatron import parallel_state
    from calm_core.model.backbone import transformer_config
    from calm_core.model.calm import CalmModel
    from calm_core.model.heads import Target
    from calm_core.model.parameters import initialize

    older = storages()
    layout, positions, size = topology.layout, TRAINING.positions, TRAINING.micro_batch
    planned = account(shape, TRAINING, layout, PlanConfig(), topology.world)
    split = pipeline_split(shape, positions, layout)
    config = transformer_config(shape.backbone, layout, torch.float32, split)
    parts = [CalmModel(config, shape, first=first, last=last, vp_stage=i) for first, last, i in topology.model_parts]
    initialize(parts, std=0.02, seed=0)
    engine = Engine(parts, TRAINING.optimizer, topology)

    def forward_step(micro_batches: Iterator[list[int]], model: CalmModel) -> tuple[Any, Any]:
        samples = next(micro_batches)
        tokens = torch.randint(shape.vocabulary, (size, positions + 1, shape.k))
        latents = [torch.randn(size, positions + 1, shape.latent)] * 2 if shape.latent else []
        target = Target(*(x[:, 1:].transpose(0, 1).contiguous() for x in (tokens, *latents)))
        output = model(tokens[:, :-1], target, SampleNoise(0, samples, topology.device))
        side = 0.0 if shape.token_loss is None else output.side
        return output, lambda output: ((output.loss + side).mean(), {})

    def step() -> None:
        micro_batches = [list(range(size))] * planned.micro_batches
        engine.forward_backward(forward_step, micro_batches, Pass(positions, size))
        engine.step(1e-3, loss=1.0)

    step()
    with LiveBytes(older) as live:
        step()
    engine.close()
    stage = planned.stages[parallel_state.get_pipeline_model_parallel_rank()]
    count = sum(parameter.numel() for part in parts for parameter in part.parameters())
    return {"predicted": stage.total, "measured": live.peak, "planned": stage.parameters, "parameters": count}


def main() -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for name in sys.argv[2:]:
        shape, layout = RUNS[name]
        with distributed(layout) as topology:
            found = run(shape, topology)
            (Path(sys.argv[1]) / f"{name}-{topology.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
