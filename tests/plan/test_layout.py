"""Worlds, layouts and batches that fit together, and the groups that ranks form."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.parallel_state import RankGenerator

from calm_core.config.model_config import BackboneConfig, HeadConfig, ModelShape
from calm_core.config.training_config import ParallelConfig, TrainingConfig
from calm_core.errors import UserError
from calm_core.plan.layout import accumulation, check_groups, check_layout, data_sizes, rank_groups

SIZES = st.integers(1, 4)


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
