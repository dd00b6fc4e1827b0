"""Worlds, layouts and batches that fit together, and the groups that ranks form."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.parallel_state import RankGenerator

from calm_core.config.model_config import BackboneConfig, HeadConfig, ModelShape
from calm_core.config.training_config import ParallelConfig, TrainingConfig
from calm_core.errors import UserError
from calm_core.plan import flops
from calm_core.plan.layout import (
    accumulation,
    balanced,
    by_part,
    check_groups,
    check_layout,
    data_sizes,
    describe,
    pipeline_split,
    rank_groups,
    stage_fractions,
)

SIZES = st.integers(1, 4)

CALM_M = ModelShape(BackboneConfig(layers=16), HeadConfig(), 128_257, k=4, latent=128)
BASELINE = replace(CALM_M, head=HeadConfig(kind="softmax"), k=1, latent=0)


@given(tensor=SIZES, pipeline=SIZES, data=SIZES)
def test_every_rank_is_in_one_group_of_each_kind(tensor: int, pipeline: int, data: int) -> None:
    groups = rank_groups(ParallelConfig(tensor, pipeline), tensor * pipeline * data)
    assert [len(groups[kind]) for kind in ("dp", "tp", "pp")] == [tensor * pipeline, pipeline * data, tensor * data]
    assert groups["tp"][0] == list(range(tensor))  # neighbours, which share a machine


@given(tensor=SIZES, pipeline=SIZES, data=SIZES)
def test_the_groups_are_those_of_megatron_core(tensor: int, pipeline: int, data: int) -> None:
    generator = RankGenerator(tensor, 1, data, pipeline, 1, order="tp-cp-ep-dp-pp")
    groups = rank_groups(ParallelConfig(tensor, pipeline), tensor * pipeline * data)
    assert groups == {kind: generator.get_ranks(kind) for kind in ("dp", "tp", "pp")}


def test_groups_that_are_wrong_are_refused() -> None:
    for groups in ([[0, 1], [1, 2]], [[0, 1], [2]], [[0, 1, 2, 3]]):
        with pytest.raises(RuntimeError, match="tp groups of 4 ranks"):
            check_groups("tp", groups, size=2, world=4)
    check_groups("tp", [[0, 1], [2, 3]], size=2, world=4)


@pytest.mark.parametrize(
    ("layout", "batch", "micro", "world", "words"),
    [
        (
            ParallelConfig(4),
            256,
            2,
            500,
            r"worlds that do are 256 or 512; .* 500 ranks is training\.global_batch=250\.",
        ),
        (
            ParallelConfig(4),
            256,
            2,
            1024,
            r"nearest worlds that do are 512; .*1024 ranks is training\.global_batch=512",
        ),
        (ParallelConfig(2, 2), 8, 1, 6, r"worlds that do are 4 or 8; .* 8 ranks is training\.global_batch=8"),
        (ParallelConfig(), 6, 4, 1, r"no world does; .* 1 ranks is training\.global_batch=8"),
        (ParallelConfig(1, 2, 2), 8, 1, 6, r"worlds that do are 4 or 8; .* 6 ranks is training\.global_batch=6"),
    ],
)
def test_a_world_that_does_not_fit_is_refused(
    layout: ParallelConfig, batch: int, micro: int, world: int, words: str
) -> None:
    with pytest.raises(UserError, match=rf"plan\.world={world} ranks do not fit .*{words}"):
        accumulation(TrainingConfig(global_batch=batch, micro_batch=micro), layout, world)


@given(tensor=SIZES, pipeline=SIZES, batch=st.integers(1, 64), micro=st.integers(1, 4), data=st.integers(1, 8))
def test_what_fits_is_what_a_run_accepts(tensor: int, pipeline: int, batch: int, micro: int, data: int) -> None:
    layout, training = ParallelConfig(tensor, pipeline), TrainingConfig(global_batch=batch, micro_batch=micro)
    world = tensor * pipeline * data
    if batch % (micro * data):
        assert data not in data_sizes(training, layout)
        with pytest.raises(UserError):
            accumulation(training, layout, world)
    else:
        assert accumulation(training, layout, world) == training.micro_batches(data) == batch // micro // data


GROUPED = BackboneConfig(layers=4, hidden=48, ffn=64, heads=12, kv_groups=6)

WHOLE = BackboneConfig(layers=4, hidden=48, ffn=64, heads=12)


@pytest.mark.parametrize(
    ("backbone", "layout", "words"),
    [
        (GROUPED, {"tensor": 4}, r"parallel\.tensor=4 does not divide the 6 key/value heads .*model\.kv_groups"),
        (WHOLE, {"tensor": 8}, r"parallel\.tensor=8 does not divide the 12 key/value heads .*: choose a divisor"),
        (replace(WHOLE, ffn=66), {"tensor": 4}, r"parallel\.tensor=4 does not divide model\.ffn=66: change one"),
        (replace(WHOLE, ffn=66), {"tensor": 6}, r"does not divide 128, .* vocabulary .*: choose a power of two"),
        (
            WHOLE,
            {"tensor": 4, "sequence": True},
            r"training\.positions=96 is not a multiple of 64, .*head\.target_group",
        ),
    ],
)
def test_layouts_that_do_not_fit(backbone: BackboneConfig, layout: dict, words: str) -> None:
    shape = ModelShape(backbone, HeadConfig(), 300, k=4, latent=8)
    with pytest.raises(UserError, match=words):
        check_layout(shape, 96, ParallelConfig(**layout))


@pytest.mark.parametrize("head", [HeadConfig(target_group=8), HeadConfig(kind="flow"), HeadConfig(kind="softmax")])
def test_layouts_that_fit(head: HeadConfig) -> None:
    shape = ModelShape(WHOLE, head, 300, k=4, latent=8)
    for layout in (ParallelConfig(tensor=4, sequence=True), ParallelConfig(tensor=2, pipeline=2, virtual=2)):
        check_layout(shape, 96, layout)


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
