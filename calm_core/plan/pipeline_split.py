"""Which layers each pipeline stage holds: so that the busiest stage does as little as it can.

The generative head works on N draws for every position and may cost as much as many layers; the compression on the
first stage costs something too. With equal numbers of layers most stages would wait for the last one. A unit of the
model counts by its training FLOPs (`flops.unit_costs`); tensor parallelism divides all units alike and does not matter.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeVar

from calm_core.config.model_config import ModelShape
from calm_core.config.training_config import ParallelConfig
from calm_core.errors import UserError
from calm_core.plan import flops
from calm_core.plan.flops import UnitCost

T = TypeVar("T")


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
