"""Which layers each pipeline stage holds: so that the busiest stage does as little as it can.

The generative head works on N samples of every position and may weigh as much as many layers; the compression on the
first stage has its weight too. Equal numbers of layers would leave most stages waiting for the last one. A piece weighs
its training FLOPs (`flops.stage_costs`); tensor parallelism divides all pieces alike and does not matter.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeVar

from calm_core.config.model_config import ModelShape
from calm_core.config.parallel_config import ParallelConfig
from calm_core.errors import UserError
from calm_core.plan import flops
from calm_core.plan.flops import StageCost

T = TypeVar("T")


def pipeline_split(shape: ModelShape, positions: int, layout: ParallelConfig) -> list[int]:
    """Layers of each part of the model, in the order of the pipeline: `layout.split`, or the balanced split.

    There are pipeline x virtual parts; part i belongs to stage i modulo pipeline. The first part also holds the
    embedding and the compression, the last one the head: these two may do without layers, the parts between may not.
    Nor may the first one where there is no compression: it would have no norm, and the ranks would not agree on the
    groups of weights (with decay and without) over which DeepSpeed reduces the gradient norm.

    Raises:
        UserError: if the layers do not suffice, or are not those of `layout.split`.
    """
    parts, layers = layout.pipeline * layout.virtual, shape.backbone.layers
    first = int(shape.head.reads_tokens)
    if layers < parts - 2 + first:
        raise UserError(
            f"model.layers={layers} leaves a part of parallel.pipeline x parallel.virtual = {parts} without a layer: "
            f"choose at most {layers + 2 - first} parts."
        )
    if not layout.split:
        work = [piece.training for piece in _costs(shape, positions, layout)]
        return balanced(work, layout.pipeline, layout.virtual, first)
    if layout.split[0] < first:
        raise UserError(
            f"parallel.split={layout.split} leaves nothing but an embedding to the first stage, as head.kind="
            f"{shape.head.kind} has no compression: give it at least 1 layer."
        )
    if sum(layout.split) != layers:
        raise UserError(
            f"parallel.split={layout.split} has {sum(layout.split)} layers in all, the model has {layers} "
            "(model.layers): make them equal."
        )
    return layout.split


def balanced(work: Sequence[int], stages: int, virtual: int = 1, first_least: int = 0) -> list[int]:
    """The numbers of layers that make the busiest stage least busy, and then the heaviest part of each stage lightest.

    `work` is that of the first part's own pieces, of each layer (all alike), and of the last part's own pieces; the
    first part gets at least `first_least` layers, those between the ends at least one. Layers being alike, it is best
    to hand them out one by one, each to who would have least with it: first to stages, then those of a stage to its
    parts. Among equals the later one takes it: it keeps fewer micro-batches' activations.
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


def pieces(whole: Sequence[T], split: Sequence[int]) -> list[list[T]]:
    """What each part of the pipeline holds of a list in the order of `flops.stage_costs`: embedding, layers, head."""
    embedding, *layers, head = whole
    rest = iter(layers)
    parts = [list(islice(rest, count)) for count in split]
    parts[0].insert(0, embedding)
    parts[-1].append(head)
    return parts


def shares(shape: ModelShape, positions: int, layout: ParallelConfig, split: Sequence[int]) -> list[float]:
    """The share of each stage in all the work of a training step; they add up to 1."""
    work = [sum(piece.training for piece in part) for part in pieces(_costs(shape, positions, layout), split)]
    return [sum(work[stage :: layout.pipeline]) / sum(work) for stage in range(layout.pipeline)]


def describe(shape: ModelShape, positions: int, layout: ParallelConfig, split: Sequence[int]) -> str:
    """The split and the share of each stage, as a line for the person who starts the run."""
    percents = " + ".join(f"{100 * share:.1f}" for share in shares(shape, positions, layout, split))
    return f"parallel.split={list(split)}: the stages share the FLOPs of a step as {percents} %"


def _costs(shape: ModelShape, positions: int, layout: ParallelConfig) -> list[StageCost]:
    """`flops.stage_costs`, with the second forward pass of layers that are recomputed."""
    embedding, *layers, head = flops.stage_costs(shape, positions)
    if layout.recompute == "full":
        layers = [replace(layer, training=layer.training + layer.forward) for layer in layers]
    return [embedding, *layers, head]


def _lightest(loads: Sequence[int]) -> int:
    """The last index of the smallest load."""
    return min(range(len(loads)), key=lambda index: (loads[index], -index))
