"""Trains the tiny model in several layouts, one after the other in one process tree, and writes what each did.

`parity_walk.py FOLDER OUT NAME...`: FOLDER is a tiny experiment, OUT/NAME.pt takes the record of the layout NAME and
OUT/NAME the checkpoint of its step 5. A NAME of the form `B<A` runs layout B from the checkpoint of layout A.
"""

import os
import sys
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calm_core import config
from calm_core.autoencoder_artefact import load_autoencoder
from calm_core.data.blend import Blend
from calm_core.data.store import ChunkStore
from calm_core.experiment import Experiment
from calm_core.model.config import ModelShape
from calm_core.parallel.config import ParallelConfig
from calm_core.parallel.topology import Topology, distributed

STEPS, SAVED = 10, 5

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
    "tp2-sp-selective": (ParallelConfig(tensor=2, sequence=True, recompute="selective"), 4),
    "tp2-sp-full": (ParallelConfig(tensor=2, sequence=True, recompute="full"), 4),
    "pp2": (ParallelConfig(pipeline=2), 2),
    "pp2-virtual2": (ParallelConfig(pipeline=2, virtual=2), 2),
    "tp2-pp2-sp": (ParallelConfig(tensor=2, pipeline=2, sequence=True), 2),
    "tp2-pp2-virtual2-sp-full": (ParallelConfig(2, 2, 2, sequence=True, recompute="full"), 1),
    "pp2-uneven": (ParallelConfig(pipeline=2, split=[3, 1]), 2),
    "pp2-all-in-last": (ParallelConfig(pipeline=2, split=[0, 4], recompute="full"), 2),
    "pp4": (ParallelConfig(pipeline=4), 1),
}


def walk(folder: Path, out: Path, names: list[str]) -> None:
    """Run each layout in turn."""
    if "RANK" in os.environ:  # one world for all: its store remembers the addresses of the first
        dist.init_process_group("gloo")
    for name in names:
        layout, micro_batch = LAYOUTS[name.split("<")[0]]
        with distributed(layout) as topology:
            record = train(folder, out, name, micro_batch, topology)
            gathered = [None] * topology.world if topology.rank == 0 else None
            dist.gather_object(record, gathered)
            if topology.rank == 0:
                torch.save(assembled(gathered), out / f"{name}.pt")


def train(folder: Path, out: Path, name: str, micro_batch: int, topology: Topology) -> dict[str, Any]:
    """Ten steps of this rank: global metrics, its own gradients before the data-parallel mean, its final weights."""
    from megatron.core import parallel_state

    from calm_core.model.parameters import initialize
    from calm_core.parallel import checkpoint
    from calm_core.parallel.checkpoint_folder import open_checkpoint
    from calm_core.parallel.engine import Engine, Pass
    from calm_core.parallel.reduce import average_metrics
    from calm_core.training.calm import CalmTask
    from calm_core.training.loader import step_samples

    experiment = config.load(Experiment, folder / "config.yaml", [f"run={folder}"])
    training, paths = experiment.training, experiment.paths
    store, held_out = (ChunkStore(paths.chunks, split) for split in ("train", "held_out"))
    shape = ModelShape(experiment.model, experiment.head, store.vocab_size, store.k, store.latent)
    autoencoder = load_autoencoder(paths.autoencoder)
    settings = topology.layout, training.positions, 0, Blend.of(store), held_out, autoencoder, experiment.evaluation
    task = CalmTask(shape, *settings)
    chunks = task.build(topology, torch.float32)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.starts_at_zero = False  # else only the last layer has a gradient at first
    initialize(chunks, std=0.15, seed=0)
    noise_seen = watch_noise(chunks)
    optimizer = replace(training.optimizer, clip=0.5)
    engine = Engine(chunks, optimizer, topology)
    saved, source = STEPS, name.partition("<")[2]
    record: dict[str, Any] = {"loss": [], "norm": [], "gradients": [], "tensor_rank": 0}
    if source:
        found = open_checkpoint(out / source / f"step-{SAVED}")
        checkpoint.load(found, engine)
    else:
        saved = SAVED
    shape_of_pass = Pass(training.positions, micro_batch)
    step_of_deepspeed = engine._deepspeed.step

    def step_and_keep() -> None:
        record["gradients"] = local_tensors(engine, engine.local_gradient)
        step_of_deepspeed()

    engine._deepspeed.step = step_and_keep
    for step in range(SAVED if source else 0, STEPS):
        count = training.global_batch // (micro_batch * topology.data_size)
        plan = step_samples(step * 8, count, micro_batch, topology.data_rank, topology.data_size)
        results = engine.forward_backward(task.forward_step, [task.load(samples) for samples in plan], shape_of_pass)
        record["loss"].append(average_metrics(results, topology)["loss"])
        update = engine.step(1e-3, admit=lambda norm: True)
        assert update.applied
        record["norm"].append(update.gradient_norm)
        if step + 1 == saved:
            checkpoint.save(out / name, SAVED, engine, {"updates": SAVED}, keep=1)
    record["weights"] = local_tensors(engine, lambda parameter: parameter)
    record["evaluation"] = {k: value for k, value in task.evaluate(engine).items() if isinstance(value, float)}
    batches = [task.load(samples) for samples in plan]
    record["columns"] = [name for name in ("tokens", "mean", "log_std") if getattr(batches[0], name) is not None]
    record["refused"] = [
        refused_step(engine, poisoned(task.forward_step, topology), batches, shape_of_pass, lambda norm: True),
        refused_step(engine, task.forward_step, batches, shape_of_pass, lambda norm: topology.rank != 0),
    ]
    record["noise"] = noise_seen
    record["place"] = topology.data_rank, parallel_state.get_tensor_model_parallel_rank(), topology.last
    return record


def refused_step(engine: Any, forward_step: Any, batches: list[Any], shape: Any, admit: Any) -> bool:
    """Whether a step that must not be applied is reported so, and leaves weights and moments as they are, bitwise."""
    before = state_of(engine)
    engine.forward_backward(forward_step, batches, shape)
    update = engine.step(1e-3, admit)
    return not update.applied and all(map(torch.equal, before, state_of(engine)))


def state_of(engine: Any) -> list[Tensor]:
    """Copies of this rank's weights, masters, moments and counts of steps."""
    masters = [flat for group in engine.optimizer.optimizer.param_groups for flat in group["params"]]
    moments = [value for state in engine.optimizer.optimizer.state.values() for value in state.values()]
    weights = [parameter for chunk in engine.chunks for parameter in chunk.parameters()]
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


def watch_noise(chunks: list[nn.Module]) -> list[str]:
    """Fingerprints of the noise that the head is given."""
    seen: list[str] = []
    for chunk in chunks:
        if chunk.last:
            chunk.head.register_forward_pre_hook(
                lambda module, args: seen.append(blake2b(args[1].numpy().tobytes(), digest_size=8).hexdigest())
            )
    return seen


def local_tensors(engine: Any, of: Any) -> dict[str, tuple[int | None, Tensor]]:
    """By global name, this rank's shard of each tensor and the dimension it is a shard along."""
    from calm_core.model.parameters import named_parameters, pieces

    return {
        piece.name: (piece.dim, piece.of(of(parameter)).detach().clone())
        for name, parameter in named_parameters(engine.chunks)
        for piece in pieces(name, parameter)
    }


def assembled(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The records of all ranks as those of the one model they are."""
    first = ranks[0]
    assert all(rank["loss"] == first["loss"] and rank["norm"] == first["norm"] for rank in ranks)
    noise = {(*rank["place"][:2],): rank["noise"] for rank in ranks if rank["place"][2]}
    spread = {kind: replica_spread(ranks, kind) for kind in ("gradients", "weights")}
    whole = {kind: whole_tensors(ranks, kind) for kind in ("gradients", "weights")}
    same = {key: first[key] for key in ("loss", "norm", "evaluation")}
    refused = all(all(rank["refused"]) for rank in ranks)
    columns = [rank["columns"] for rank in ranks]
    return {**same, **whole, "replica_spread": spread, "noise": noise, "refused": refused, "columns": columns}


def whole_tensors(ranks: list[dict[str, Any]], kind: str) -> dict[str, Tensor]:
    """Global tensors: shards joined over tensor-parallel ranks, the mean over data-parallel ranks."""
    shards: dict[str, dict[int, dict[int, tuple[int | None, Tensor]]]] = {}
    for rank in ranks:
        data_rank, tensor_rank, _ = rank["place"]
        for name, shard in rank[kind].items():
            shards.setdefault(name, {}).setdefault(data_rank, {})[tensor_rank] = shard
    return {name: torch.stack([joined(copy) for copy in copies.values()]).mean(0) for name, copies in shards.items()}


def joined(shards: dict[int, tuple[int | None, Tensor]]) -> Tensor:
    dim, tensor = shards[0]
    return tensor if dim is None else torch.cat([shards[rank][1] for rank in sorted(shards)], dim)


def replica_spread(ranks: list[dict[str, Any]], kind: str) -> float:
    """The largest difference between copies that must be equal: of tensor-parallel ranks, and weights of all."""
    copies: dict[Any, list[Tensor]] = {}
    for rank in ranks:
        data_rank, tensor_rank, _ = rank["place"]
        for name, (dim, tensor) in rank[kind].items():
            data = data_rank if kind == "gradients" else None
            copies.setdefault((name, data, None if dim is None else tensor_rank), []).append(tensor)
    return max((copy - group[0]).abs().max().item() for group in copies.values() for copy in group)


if __name__ == "__main__":
    walk(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
