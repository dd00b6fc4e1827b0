from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calm_core.config.experiment import EvaluationConfig
from calm_core.config.training_config import ParallelConfig
from calm_core.errors import UserError
from calm_core.evaluation.held_out import STRIDE, HeldOut, measure, scored_offsets


def held_out(positions: int = 64, k: int = 4, available: int = 40, **options: int) -> HeldOut:
    protocol = options.pop("protocol", "default")
    windows = SimpleNamespace(positions=positions, store=SimpleNamespace(k=k, packing="pack"))
    windows = type("Windows", (), {**vars(windows), "__len__": lambda self: available})()
    return HeldOut(windows, None, None, 0, EvaluationConfig(**options), protocol=protocol)


@given(positions=st.integers(48, 300), k=st.sampled_from([1, 2, 3, 4, 5, 8, 16]))
def test_scored_tokens_are_aligned_and_have_half_the_context_before_them(positions, k):
    tokens = positions * k
    offsets = scored_offsets(positions, k)
    assert offsets.tolist() == [o for o in range(tokens) if o % STRIDE == 0 and o >= tokens / 2 and o + 4 <= tokens]
    [scored] = held_out(positions, k, places=8).groups(1)
    assert (scored.positions >= 0).all()
    assert torch.equal((scored.positions + 1) * k + scored.known, scored.offsets)
    # A roll-out stays in the window.
    assert (scored.positions + held_out(positions, k).rollout_chunks <= positions).all()


@pytest.mark.parametrize("places", [0, 1, 5, 100])
def test_models_of_every_k_score_the_same_token_offsets(places):
    offsets = [scored_offsets(240 // k, k, places).tolist() for k in (1, 2, 3, 4, 5, 8, 16)]
    assert all(own == offsets[0] for own in offsets)
    assert len(offsets[0]) == min(places or 30, 30)


def test_every_token_of_a_chunk_is_scored():
    offsets = scored_offsets(32, 8)
    scored = {int(offset + i) % 8 for offset in offsets for i in range(4)}
    assert scored == set(range(8))
    description = held_out(32, 8).description()
    assert description["known_tokens"] == [0, 4]
    assert description["rollout_chunks"] == 1
    assert held_out(64, 4).description()["known_tokens"] == [0]


@pytest.mark.parametrize(
    ("k", "chunks"), [(1, 4), (2, 2), (3, 2), (4, 1), (5, 2), (6, 2), (7, 2), (8, 1), (12, 1), (16, 1)]
)
def test_a_draw_has_as_many_chunks_as_four_tokens_take(k, chunks):
    assert held_out(512, k).rollout_chunks == chunks


def test_fewer_positions_are_spread_over_all_of_them():
    every = scored_offsets(128, 4).tolist()
    assert len(every) == 64
    assert scored_offsets(128, 4, 3).tolist() == [every[0], every[31], every[-1]]


def test_the_name_tells_stride_context_padding_and_protocol():
    assert measure(512, 4) == measure(512, 1) == measure(512, 3, "pack") == "brier_lm@ctx512/stride4"
    assert measure(512, 4, "align") == "brier_lm@ctx512/stride4/align4"
    assert measure(8192, 4, protocol="paper") == "brier_lm@paper/ctx8192"


def test_a_window_without_a_scored_position_is_refused():
    with pytest.raises(UserError, match=r"3 positions of 1 tokens has no position .* raise training\.positions"):
        scored_offsets(3, 1)
    with pytest.raises(UserError, match=r"1 positions of 8 tokens has no position .* raise training\.positions"):
        scored_offsets(1, 8)
    assert scored_offsets(2, 4).tolist() == [4]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_groups_hold_every_offset_once_and_divide_among_ranks(ranks):
    subject = held_out(2048, 4, samples=100)
    groups = list(subject.groups(ranks))
    assert len(groups) > 1
    assert all(len(group.offsets) % (8 * ranks if ranks == 3 else 8) == 0 for group in groups)
    assert torch.equal(torch.cat([group.offsets[group.counted] for group in groups]), subject.offsets)


def test_the_paper_scores_every_position_by_two_draws():
    subject = held_out(2048, 4, protocol="paper")
    assert subject.offsets.tolist() == list(range(4, 8192, 4))
    assert subject.draws == 2
    assert held_out(8192, 1, protocol="paper").offsets.tolist() == list(range(1, 8189))


def test_held_out_windows_are_divided_among_the_ranks() -> None:
    def own(rank: int, ranks: int, layout: ParallelConfig, available: int = 40, **options: int) -> list[np.ndarray]:
        subject = held_out(available=available, **{"windows": 16, "micro_batch": 2, **options})
        world = ranks * layout.tensor * layout.pipeline
        return subject.micro_batches(SimpleNamespace(data_rank=rank, data_size=ranks, world=world, layout=layout))

    alone = np.stack(own(0, 1, ParallelConfig()))
    assert alone.shape == (8, 2)
    assert (alone[0, 0], alone[-1, -1]) == (0, 39)
    shares = [own(rank, 4, ParallelConfig()) for rank in range(4)]
    assert sorted(np.concatenate(shares).flatten()) == alone.flatten().tolist()
    assert len(own(0, 1, ParallelConfig(pipeline=3, virtual=2))) % 3 == 0
    with pytest.raises(UserError, match=r"has 40 windows, fewer than the 48 .*lower evaluation\.micro_batch"):
        own(0, 4, ParallelConfig(pipeline=2), micro_batch=12)
    with pytest.raises(UserError, match=r"has 3 windows, fewer than the 4 data-parallel ranks .*start fewer"):
        own(0, 4, ParallelConfig(), available=3)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 9), st.integers(1, 9))
def test_any_number_of_ranks_scores_the_same_windows(available: int, windows: int, size: int, ranks: int) -> None:
    subject, ranks = held_out(available=available, windows=windows, micro_batch=size), min(ranks, available, windows)
    one, *_ = worlds = [
        [
            subject.micro_batches(SimpleNamespace(data_rank=rank, data_size=n, world=n, layout=ParallelConfig()))
            for rank in range(n)
        ]
        for n in (1, ranks)
    ]
    for shares in worlds:
        assert len({len(share) for share in shares}) == 1
        assert all(1 <= len(batch) <= size + 1 for share in shares for batch in share)
        scored = sorted(int(window) for share in shares for batch in share for window in batch)
        assert scored == sorted(int(window) for batch in one[0] for window in batch)


def test_a_single_rank_scores_every_window() -> None:
    found = held_out(available=11, windows=0, micro_batch=4).micro_batches(
        SimpleNamespace(data_rank=0, data_size=1, world=1, layout=ParallelConfig())
    )
    assert [batch.tolist() for batch in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
