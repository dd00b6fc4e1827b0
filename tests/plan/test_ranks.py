"""Worlds, layouts and batches that fit together, and the groups that ranks form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_core.errors import UserError
from calm_core.parallel.config import ParallelConfig
from calm_core.plan.ranks import accumulation, check_groups, data_sizes, rank_groups
from calm_core.training.config import TrainingConfig

SIZES = st.integers(1, 4)


@given(tensor=SIZES, pipeline=SIZES, data=SIZES)
def test_every_rank_is_in_one_group_of_each_kind(tensor: int, pipeline: int, data: int) -> None:
    groups = rank_groups(ParallelConfig(tensor, pipeline), tensor * pipeline * data)
    assert [len(groups[kind]) for kind in ("dp", "tp", "pp")] == [tensor * pipeline, pipeline * data, tensor * data]
    assert groups["tp"][0] == list(range(tensor))  # neighbours, which share a machine


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
