"""Trains the tiny model in several layouts, one after the other in one process tree, and writes what each did.

`parity_walk.py FOLDER OUT NAME...`: FOLDER is a tiny experiment, OUT/NAME.pt takes the record of NAME, which reads

    HEAD/LAYOUT           six steps with this head in this layout; OUT/NAME is the checkpoint of step 3
    HEAD/LAYOUT<LAYOUT    the last three, from the checkpoint of another layout
    HEAD/LAYOUT!RULE      six steps without one of the rules by which ranks agree (see `parity_rules`)
    HEAD@bf16/LAYOUT      three steps with bf16 weights and activations
    HEAD@tokens/LAYOUT    three steps with a token side loss (`SIDE_LOSS` has further ones)
    HEAD@padded/LAYOUT    three steps on windows with chunks of nothing but padding; also HEAD@padded-tokens
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from parity_record import assembled
from parity_rules import dropped
from torch import Tensor

from calm_core import config
from calm_core.config.experiment import Experiment
from calm_core.config.training_config import ParallelConfig
from calm_core.data.dataset import ChunkBatch
from calm_core.distributed.topology import Topology, distributed
from calm_core.model.noise import SampleNoise
from calm_core.training.launch import calm_rows, calm_task

STEPS, SAVED = 6, 3
FEW_STEPS = 3
BUCKET = 10_000  # of about a hundred thousand parameters

# The token side losses of the variants.
SIDE_LOSS = {
    "tokens": {"weight": 2.0, "rank": 6},
    "random-token": {"weight": 2.0, "rank": 6, "tokens": "random", "every": 4},
    "full-rank": {"weight": 2.0, "rank": 0},
    "padded-tokens": {"weight": 2.0, "rank": 6},
}

# Layout and samples per micro-batch, of 8 samples a step.
LAYOUTS: dict[str, tuple[ParallelConfig, int]] = {
    "single": (ParallelConfig(), 4),
    "single-micro1": (ParallelConfig(), 1),
    "single-selective": (ParallelConfig(recompute="selective"), 8),
    "single-full": (ParallelConfig(recompute="full"), 8),
    "dp": (ParallelConfig(), 2),
    "dp8": (ParallelConfig(), 1),
    "tp2": (ParallelConfig(tensor=2), 4),
    "tp2-sp": (ParallelConfig(tensor=2, sequence=True), 2),
    "tp2-sp-whole-head": (ParallelConfig(tensor=2, sequence=True, head="replicated"), 2),
    "tp2-sp-full-compiled": (ParallelConfig(tensor=2, sequence=True, recompute="full", compile="always"), 4),
    "tp2-sp-selective": (ParallelConfig(tensor=2, sequence=True, recompute="selective"), 4),
    "tp2-sp-full": (ParallelConfig(tensor=2, sequence=True, recompute="full"), 4),
    "pp2": (ParallelConfig(pipeline=2), 2),
    "pp2-virtual2": (ParallelConfig(pipeline=2, virtual=2), 2),
    "tp2-pp2-sp": (ParallelConfig(tensor=2, pipeline=2, sequence=True), 2),
    "tp2-pp2-virtual2-sp-full": (ParallelConfig(2, 2, 2, sequence=True, recompute="full"), 1),
    "pp2-uneven": (ParallelConfig(pipeline=2, split=[3, 1]), 2),
    "pp2-all-in-first": (ParallelConfig(pipeline=2, split=[4, 0], recompute="selective"), 2),
    "pp2-all-in-last": (ParallelConfig(pipeline=2, split=[0, 4], recompute="full"), 2),
    "pp4": (ParallelConfig(pipeline=4), 1),
}


class Place(NamedTuple):
    """A rank's place in its layout."""

    data: int
    tensor: int
    pipeline: int
    last: bool


def walk(folder: Path, out: Path, names: list[str]) -> None:
    """Train under each name in turn."""
    if "RANK" in os.environ:  # one world for all: its store remembers the addresses of the first
        dist.init_process_group("gloo")
    for name in names:
        kind, layout, source, rule = re.fullmatch(r"([^/]+)/([^<!]+)<?([^!]*)!?(.*)", name).groups()
        with distributed(replace(LAYOUTS[layout][0], reduce_bucket=BUCKET)) as topology, dropped(rule):
            started = out / kind / source if source else None
            record = train(folder, kind, LAYOUTS[layout][1], topology, out / name, started)
            gathered = [None] * topology.world if topology.rank == 0 else None
            dist.gather_object(record, gathered)
            if topology.rank == 0:
                (out / name).parent.mkdir(exist_ok=True)
                torch.save(assembled(gathered), out / f"{name}.pt")


def train(
    folder: Path, kind: str, micro_batch: int, topology: Topology, saved: Path, source: Path | None
) -> dict[str, Any]:
    """The steps of this rank: global metrics, the gradients that its tensor-parallel rank holds, its final weights."""
    from calm_core.checkpoint import load as checkpoint
    from calm_core.checkpoint.folder import open_checkpoint
    from calm_core.distributed.collectives import average_metrics
    from calm_core.distributed.engine import Engine, Pass
    from calm_core.megatron import parallel_state
    from calm_core.model.parameters import initialize
    from calm_core.training.batch_loader import step_samples

    head, _, variant = kind.partition("@")
    # The iterative heads take twenty or a hundred evaluations of their network for a sample: they are given fewer.
    windows = 2 if head in ("diffusion", "flow") else 16
    changes = [f"run={folder}", f"head.kind={head}", f"evaluation.windows={windows}"]
    side = [f"training.token_loss.{key}={value}" for key, value in SIDE_LOSS.get(variant, {}).items()]
    experiment = config.load(Experiment, folder / "config.yaml", [*changes, *side])
    training = experiment.training
    experiment = replace(experiment, parallel=topology.layout)
    rows = calm_rows(experiment)
    if variant.startswith("padded"):
        rows[0].first.manifest["packing"] = "align"  # the store knows its padding then
    task = calm_task(experiment, rows, topology.device)
    parts = task.build(topology, torch.bfloat16 if variant == "bf16" else torch.float32)
    for part in parts:
        for parameter in part.parameters():
            parameter.starts_at_zero = False  # else only the last layer has a gradient at first
    initialize(parts, std=0.15, seed=0)
    engine = Engine(parts, replace(training.optimizer, clip=0.5), topology)
    place = Place(
        topology.data_rank,
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        topology.last,
    )
    record: dict[str, Any] = {"loss": [], "norm": [], "gradients": {}, "place": place}
    if source:
        checkpoint.load(open_checkpoint(source / f"step-{SAVED}"), engine)
    shape_of_pass = Pass(training.positions, micro_batch)
    step_of_shards = engine.zero.step

    def step_and_keep() -> None:
        gather_gradients(engine)
        record["gradients"] = local_tensors(engine, lambda parameter: parameter.main_grad)
        step_of_shards()

    engine.zero.step = step_and_keep
    with noise_watched() as record["noise"]:
        for step in range(SAVED if source else 0, FEW_STEPS if variant else STEPS):
            count = training.global_batch // (micro_batch * topology.data_size)
            plan = step_samples(step * 8, count, micro_batch, topology.data_rank, topology.data_size)
            batches = [task.load(samples) for samples in plan]
            if variant.startswith("padded"):
                fill_up(batches, rows[0].first.padding)
            task.begin(step / STEPS)
            results = engine.forward_backward(task.forward_step, batches, shape_of_pass)
            record["loss"].append(average_metrics(results, topology)["loss"])
            update = engine.step(1e-3, loss=1.0)
            assert update.applied
            record["norm"].append(update.gradient_norm)
            if step + 1 == SAVED:
                checkpoint.save(saved, SAVED, engine, {"updates": SAVED}, keep=1)
    record["weights"] = local_tensors(engine, lambda parameter: parameter)
    record["evaluation"] = {k: value for k, value in task.evaluate(engine).items() if isinstance(value, float)}
    record["columns"] = [name for name in ("tokens", "mean", "log_std") if getattr(batches[0], name) is not None]
    record["refused"] = [
        refused_step(engine, poisoned(task.forward_step, topology), batches, shape_of_pass, 1.0),
        refused_step(engine, task.forward_step, batches, shape_of_pass, torch.nan if topology.rank == 0 else 1.0),
    ]
    engine.close()
    return record


def fill_up(batches: list[ChunkBatch], padding: int) -> None:
    """Put padding for the last chunks of every window: in 16 samples from none of them to all."""
    for batch in batches:
        for row, sample in enumerate(batch.samples if batch.tokens is not None else ()):
            chunks = batch.tokens.shape[1]
            batch.tokens[row, chunks - int(sample) % 16 * chunks // 15 :] = padding


@contextmanager
def noise_watched() -> Iterator[list[str]]:
    """Fingerprints of everything drawn in this block, one for each sample."""
    seen: list[str] = []
    drawn = SampleNoise._stack

    def stack(noise: SampleNoise, name: str, *arguments: Any) -> Tensor:
        draws = drawn(noise, name, *arguments)
        for column in draws.unbind(1):
            seen.append(f"{name} {blake2b(column.cpu().numpy().tobytes(), digest_size=8).hexdigest()}")
        return draws

    with patch.object(SampleNoise, "_stack", stack):
        yield seen


def refused_step(engine: Any, forward_step: Any, batches: list[Any], shape: Any, loss: float) -> bool:
    """Whether a step that must not be applied is reported so, and leaves weights and moments as they are, bitwise."""
    before = state_of(engine)
    engine.forward_backward(forward_step, batches, shape)
    update = engine.step(1e-3, loss)
    return not update.applied and all(map(torch.equal, before, state_of(engine)))


def state_of(engine: Any) -> list[Tensor]:
    """Copies of this rank's weights, masters, moments and counts of steps."""
    masters = [flat for group in engine.optimizer.param_groups for flat in group["params"]]
    moments = [value for state in engine.optimizer.state.values() for value in state.values()]
    weights = [parameter for part in engine.model_parts for parameter in part.parameters()]
    return [tensor.detach().clone() for tensor in (*weights, *masters, *moments)]


def poisoned(forward_step: Any, topology: Topology) -> Any:
    """The forward step with a loss that is not a number, on one data-parallel rank."""

    def step(micro_batches: Any, model: Any) -> Any:
        output, loss_of = forward_step(micro_batches, model)

        def poisoned_loss(output: Any) -> Any:
            loss, metrics = loss_of(output)
            return loss * (torch.nan if topology.data_rank == topology.data_size - 1 else 1), metrics

        return output, poisoned_loss

    return step


def gather_gradients(engine: Any) -> None:
    """Let the gradients of this rank's parameters be those that its data-parallel group has reduced into shards."""
    zero = engine.zero
    for whole, shard in zip(zero.fp32_groups_gradients_flat, zero.fp32_groups_gradient_flat_partition, strict=True):
        dist.all_gather_into_tensor(whole, shard.clone(), group=zero.dp_process_group)


def local_tensors(engine: Any, of: Any) -> dict[str, tuple[int | None, Tensor]]:
    """By global name, this rank's shard of each tensor and the dimension it is a shard along."""
    from calm_core.model.parameters import named_parameters, pieces

    return {
        piece.name: (piece.dim, piece.of(of(parameter)).detach().clone())
        for name, parameter in named_parameters(engine.model_parts)
        for piece in pieces(name, parameter)
    }


if __name__ == "__main__":
    walk(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
