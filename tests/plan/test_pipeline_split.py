"""The pipeline's split against every other split there is."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_core.config.model_config import BackboneConfig, HeadConfig, ModelShape
from calm_core.config.training_config import ParallelConfig
from calm_core.errors import UserError
from calm_core.plan import flops
from calm_core.plan.pipeline_split import balanced, by_part, describe, pipeline_split, stage_fractions

CALM_M = ModelShape(BackboneConfig(layers=16), HeadConfig(), 128_257, k=4, latent=128)
BASELINE = replace(CALM_M, head=HeadConfig(kind="softmax"), k=1, latent=0)


def every_split(layers: int, parts: int) -> Iterator[tuple[int, ...]]:
    for middle in product(range(1, layers + 1), repeat=parts - 2):
        for first in range(layers - sum(middle) + 1):
            yield (first, *middle, layers - sum(middle) - first)


def loads(work: list[int], split: tuple[int, ...]) -> list[int]:
    return [
        count * work[1] + (work[0] if part == 0 else 0) + (work[-1] if part == len(split) - 1 else 0)
        for part, count in enumerate(split)
    ]


@given(st.sampled_from([(2, 1), (3, 1), (4, 1), (2, 2)]), st.integers(2, 9), *[st.integers(0, 40)] * 2)
def test_no_split_has_a_lighter_heaviest_stage(layout: tuple[int, int], layers: int, first: int, last: int) -> None:
    stages, virtual = layout
    work = [first, *[10] * layers, last]

    def heaviest(split: tuple[int, ...]) -> tuple[int, int]:
        parts = loads(work, split)
        return max(sum(parts[stage::stages]) for stage in range(stages)), max(parts)

    chosen = balanced(work, stages, virtual)
    assert sum(chosen) == layers
    best = min(map(heaviest, every_split(layers, stages * virtual)))
    assert heaviest(tuple(chosen))[0] == best[0]
    if virtual == 1:
        assert heaviest(tuple(chosen)) == best


def test_the_head_counts_with_its_samples() -> None:
    four = ParallelConfig(pipeline=4)
    split = pipeline_split(CALM_M, 2048, four)
    few = pipeline_split(replace(CALM_M, head=HeadConfig(samples=2)), 2048, four)
    assert sum(split) == sum(few) == 16
    assert split[-1] < few[-1] < split[1]
    assert pipeline_split(BASELINE, 2048, four)[-1] < 4  # logits of 128k tokens
    assert pipeline_split(CALM_M, 2048, ParallelConfig()) == [16]


def test_a_heavy_head_has_a_stage_to_itself() -> None:
    shape = replace(CALM_M, backbone=BackboneConfig(layers=4))
    assert pipeline_split(shape, 2048, ParallelConfig(pipeline=4))[-1] == 0


def test_without_compression_the_first_stage_has_a_layer() -> None:
    two = replace(BASELINE, backbone=BackboneConfig(layers=2))
    assert pipeline_split(two, 2048, ParallelConfig(pipeline=3)) == [1, 1, 0]
    with pytest.raises(UserError, match="choose at most 3 parts"):
        pipeline_split(two, 2048, ParallelConfig(pipeline=4))
    with pytest.raises(UserError, match=r"split=\[0, 2\] .* head\.kind=softmax .* at least 1 layer"):
        pipeline_split(two, 2048, ParallelConfig(pipeline=2, split=[0, 2]))


def test_recomputed_layers_weigh_more() -> None:
    plain, again = (pipeline_split(CALM_M, 2048, ParallelConfig(pipeline=2, recompute=r)) for r in ("none", "full"))
    assert again[-1] > plain[-1]


def test_every_unit_is_in_one_part() -> None:
    costs = flops.unit_costs(CALM_M, 2048)
    parts = by_part(costs, [0, 9, 7, 0])
    assert [unit for part in parts for unit in part] == costs
    assert [len(part) for part in parts] == [1, 9, 7, 1]


def test_stage_fractions_by_hand() -> None:
    embedding, layer, *_, head = (cost.training for cost in flops.unit_costs(CALM_M, 2048))
    layout = ParallelConfig(pipeline=2, virtual=2, split=[3, 5, 6, 2])
    whole = embedding + 16 * layer + head
    expected = [(embedding + 9 * layer) / whole, (7 * layer + head) / whole]
    assert stage_fractions(CALM_M, 2048, layout, layout.split) == pytest.approx(expected)
    percents = " + ".join(f"{100 * share:.1f}" for share in expected)
    line = f"parallel.split=[3, 5, 6, 2]: the stages share the FLOPs of a step as {percents} %"
    assert describe(CALM_M, 2048, layout, layout.split) == line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": [8, 8]}, r"parallel\.split=\[8, 8\] must be .* = 1 numbers"),
        ({"pipeline": 3, "split": [8, 8]}, "= 3 numbers"),
        ({"pipeline": 3, "split": [8, 0, 8]}, "only the first and the last may be 0"),
        ({"pipeline": 2, "split": [17, -1]}, r"\[17, -1\] must be"),
        ({"pipeline": 2, "split": [8, 9]}, r"17 layers in total, but the model has 16 \(model\.layers\)"),
        ({"pipeline": 20}, r"model\.layers=16 .* = 20 without a layer: choose at most 18 parts"),
    ],
)
def test_impossible_splits(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        pipeline_split(CALM_M, 2048, ParallelConfig(**options))


def test_a_split_may_be_given() -> None:
    assert pipeline_split(CALM_M, 2048, ParallelConfig(pipeline=3, split=[0, 10, 6])) == [0, 10, 6]
