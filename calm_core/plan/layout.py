"""Whether a layout of ranks fits a model and a batch, and which layers each pipeline stage holds.

What would fail later, or run with wrong results, is refused here. The layers are divided so that the busiest stage does
as little as it can. The generative head works on N draws for every position and may cost as much as many layers; the
compression on the first stage costs something too. With equal numbers of layers most stages would wait for the last
one. A unit of the model counts by its training FLOPs (`flops.unit_costs`); tensor parallelism divides all units alike
and does not matter.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeVar

from calm_core.config.model_config import VOCABULARY_MULTIPLE, ModelShape
from calm_core.config.training_config import ParallelConfig, TrainingConfig
from calm_core.errors import UserError
from calm_core.model.heads import head_module
from calm_core.plan import flops
from calm_core.plan.flops import UnitCost

T = TypeVar("T")


def accumulation(training: TrainingConfig, layout: ParallelConfig, world: int, section: str = "training") -> int:
    """Micro-batches that each data-parallel rank accumulates in a step; `section` is the key of `training`.

    Raises:
        UserError: if the world does not fit; it names the nearest worlds and the nearest global batch that do.
    """
    model = layout.tensor * layout.pipeline
    fitting = sorted(model * size for size in data_sizes(training, layout))
    if not world % model and world in fitting:
        return training.micro_batches(world // model, layout.micro_batch_multiple)
    near = [max((w for w in fitting if w < world), default=0), min((w for w in fitting if w > world), default=0)]
    worlds = " or ".join(str(w) for w in near if w)
    size = max(1, round(world / model))
    together = training.least_micro_batch * size * layout.micro_batch_multiple
    batch = max(1, round(training.global_batch / together)) * together
    raise UserError(
        f"plan.world={world} ranks do not fit parallel.tensor={layout.tensor} x parallel.pipeline={layout.pipeline} "
        f"and {section}.global_batch={training.global_batch} of micro-batches of {training.least_micro_batch}: "
        + (f"the nearest worlds that do are {worlds}; " if worlds else "no world does; ")
        + f"the nearest batch for {size * model} ranks is {section}.global_batch={batch}."
    )


def data_sizes(training: TrainingConfig, layout: ParallelConfig) -> list[int]:
    """Data-parallel sizes that divide the global batch evenly."""
    rest, remainder = divmod(training.global_batch, training.least_micro_batch * layout.micro_batch_multiple)
    return [] if remainder else [size for size in range(1, rest + 1) if rest % size == 0]


def rank_groups(layout: ParallelConfig, world: int) -> dict[str, list[list[int]]]:
    """The data-, tensor- and pipeline-parallel groups, as Megatron-core forms them, without importing it.

    Rank r is at tensor index r mod T, data index r / T mod D and pipeline index r / (T D): neighbours share a layer's
    matrices, the farthest ranks share the layers.

    Raises:
        RuntimeError: if a rank is not in exactly one group of each kind, or a group has another size than its kind's.
    """
    tensor, data = layout.tensor, layout.data_parallel(world)
    ranks = range(world)
    stages = [ranks[start : start + tensor * data] for start in range(0, world, tensor * data)]
    groups = {
        "dp": [list(stage[index::tensor]) for stage in stages for index in range(tensor)],
        "tp": [list(ranks[start : start + tensor]) for start in range(0, world, tensor)],
        "pp": [list(ranks[start :: tensor * data]) for start in range(tensor * data)],
    }
    for kind, size in {"dp": data, "tp": tensor, "pp": layout.pipeline}.items():
        check_groups(kind, groups[kind], size, world)
    return groups


def check_groups(kind: str, groups: Iterable[list[int]], size: int, world: int) -> None:
    """Refuse groups that do not hold each of `world` ranks exactly once, `size` in each.

    Raises:
        RuntimeError: naming the kind.
    """
    groups = list(groups)
    if sorted(rank for group in groups for rank in group) != list(range(world)) or {len(g) for g in groups} != {size}:
        raise RuntimeError(f"the {kind} groups of {world} ranks do not hold each rank once, {size} in each")


def check_layout(shape: ModelShape, positions: int, layout: ParallelConfig) -> None:
    """Refuse a layout whose tensor-parallel ranks cannot divide this model, or its samples of S positions, evenly.

    `pipeline_split` checks the stages.

    Raises:
        UserError: naming the key and how to change it.
    """
    backbone, tensor = shape.backbone, layout.tensor
    if backbone.key_value_heads % tensor:
        raise UserError(
            f"parallel.tensor={tensor} does not divide the {backbone.key_value_heads} key/value heads of the model "
            "(model.kv_groups, or model.heads where that is 0): choose a divisor of them."
        )
    if layout.head == "replicated" and shape.head.kind != "energy":
        raise UserError(f"parallel.head=replicated is for head.kind=energy, not {shape.head.kind}: set it to split.")
    for name in ("hidden", "ffn"):
        if getattr(backbone, name) % tensor:
            raise UserError(
                f"parallel.tensor={tensor} does not divide model.{name}={getattr(backbone, name)}: change one of them."
            )
    if VOCABULARY_MULTIPLE % tensor:
        raise UserError(
            f"parallel.tensor={tensor} does not divide {VOCABULARY_MULTIPLE}, and every vocabulary is padded to a "
            f"multiple of {VOCABULARY_MULTIPLE}: choose a power of two."
        )
    side = shape.token_loss
    own = positions // tensor if layout.sequence else positions
    if side and own % side.every:
        raise UserError(
            f"training.token_loss.every={side.every} does not divide the {own} positions of a sample on each rank "
            "(training.positions, over parallel.tensor where parallel.sequence=true): choose a divisor."
        )
    group = head_module(shape.head.kind).costs(shape).shared_positions
    if layout.sequence and positions % (tensor * group):
        raise UserError(
            f"training.positions={positions} is not a multiple of {tensor * group}, parallel.tensor x the {group} "
            "positions that share draws of the loss (head.target_group of the energy head), which "
            "parallel.sequence=true needs: change one of them."
        )


def pipeline_split(shape: ModelShape, positions: int, layout: ParallelConfig) -> list[int]:
    """Layers of each model part, in the order of the pipeline: `layout.split`, or the balanced split.

    There are pipeline x virtual parts; part i belongs to stage i modulo pipeline. The first part also holds the
    embedding and the compression, the last one the head: these two may have no layers, the parts between may not. Nor
    may the first one where there is no compression: it would have no norm, and the ranks would not agree on the
    groups of weights (with decay and without) over which DeepSpeed reduces the gradient norm.

    Raises:
        UserError: if there are too few layers, or `layout.split` has another number of them.
    """
    parts, layers = layout.pipeline * layout.virtual, shape.backbone.layers
    first = int(shape.head.reads_tokens)
    if layers < parts - 2 + first:
        raise UserError(
            f"model.layers={layers} leaves a part of parallel.pipeline x parallel.virtual = {parts} without a layer: "
            f"choose at most {layers + 2 - first} parts."
        )
    if not layout.split:
        work = [unit.training for unit in _costs(shape, positions, layout)]
        return balanced(work, layout.pipeline, layout.virtual, first)
    if layout.split[0] < first:
        raise UserError(
            f"parallel.split={layout.split} leaves the first stage only an embedding, because head.kind="
            f"{shape.head.kind} has no compression: give it at least 1 layer."
        )
    if sum(layout.split) != layers:
        raise UserError(
            f"parallel.split={layout.split} has {sum(layout.split)} layers in total, but the model has {layers} "
            "(model.layers): make them equal."
        )
    return layout.split


def balanced(work: Sequence[int], stages: int, virtual: int = 1, first_least: int = 0) -> list[int]:
    """The numbers of layers that make the busiest stage least busy, and then the heaviest part of each stage lightest.

    `work` is that of the embedding, of each layer (all alike), and of the head. The first part gets at least
    `first_least` layers, those between the ends at least one. As layers are alike, it is optimal to assign them one by
    one, each to the stage that is least busy, and within it to the least busy part. Of equal ones the later one gets
    it: it keeps the activations of fewer micro-batches.
    """
    first, *layers, last = work
    parts = stages * virtual
    if parts == 1:
        return [len(layers)]
    held = [first_least] + [1] * (parts - 2) + [0]
    own = [first] + [0] * (parts - 2) + [last]
    loads = [extra + count * layers[0] for extra, count in zip(own, held, strict=True)]
    of_stage = [sum(loads[stage::stages]) for stage in range(stages)]
    for _ in range(len(layers) - sum(held)):
        stage = _lightest(of_stage)
        part = range(stage, parts, stages)[_lightest(loads[stage::stages])]
        held[part] += 1
        loads[part] += layers[0]
        of_stage[stage] += layers[0]
    return held


def by_part(units: Sequence[T], split: Sequence[int]) -> list[list[T]]:
    """A value for each unit of the model (embedding, layers, head), grouped by model part."""
    embedding, *layers, head = units
    rest = iter(layers)
    parts = [list(islice(rest, count)) for count in split]
    parts[0].insert(0, embedding)
    parts[-1].append(head)
    return parts


def stage_fractions(shape: ModelShape, positions: int, layout: ParallelConfig, split: Sequence[int]) -> list[float]:
    """The fraction of each stage in the FLOPs of a training step; they add up to 1."""
    work = [sum(unit.training for unit in part) for part in by_part(_costs(shape, positions, layout), split)]
    return [sum(work[stage :: layout.pipeline]) / sum(work) for stage in range(layout.pipeline)]


def describe(shape: ModelShape, positions: int, layout: ParallelConfig, split: Sequence[int]) -> str:
    """The split and the fraction of the FLOPs on each stage, as a line for the person who starts the run."""
    percents = " + ".join(f"{100 * share:.1f}" for share in stage_fractions(shape, positions, layout, split))
    return f"parallel.split={list(split)}: the stages share the FLOPs of a step as {percents} %"


def _costs(shape: ModelShape, positions: int, layout: ParallelConfig) -> list[UnitCost]:
    """`flops.unit_costs`, with the second forward pass of layers that are recomputed."""
    embedding, *layers, head = flops.unit_costs(shape, positions)
    if layout.recompute == "full":
        layers = [replace(layer, training=layer.training + layer.forward) for layer in layers]
    return [embedding, *layers, head]


def _lightest(loads: Sequence[int]) -> int:
    """The last index of the smallest load."""
    return min(range(len(loads)), key=lambda index: (loads[index], -index))
