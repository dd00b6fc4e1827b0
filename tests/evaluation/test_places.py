import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_core.errors import UserError
from calm_core.evaluation.places import STRIDE, chunks_to_draw, measure, scored_positions


@given(positions=st.integers(48, 300), k=st.sampled_from([1, 2, 3, 4, 8, 16]))
def test_scored_chunks_are_aligned_and_have_half_the_context_before_them(positions, k):
    targets = (scored_positions(positions, k) + 1).tolist()
    assert targets == [
        t for t in range(1, positions) if t * k % STRIDE == 0 and t >= positions / 2 and t * k + 4 <= positions * k
    ]
    assert all(t + chunks_to_draw(k) <= positions for t in targets)


@pytest.mark.parametrize("places", [0, 1, 5, 100])
def test_models_of_every_k_score_the_same_token_offsets(places):
    offsets = [((scored_positions(256 // k, k, places) + 1) * k).tolist() for k in (1, 2, 4, 8)]
    assert all(own == offsets[0] for own in offsets)
    assert len(offsets[0]) == min(places or 16, 16)


def test_fewer_places_are_spread_over_all_of_them():
    every = scored_positions(512, 1).tolist()
    assert scored_positions(512, 1, 3).tolist() == [every[0], every[15], every[-1]]


def test_the_name_tells_stride_context_and_padding():
    assert measure(512, 4) == measure(512, 1) == measure(512, 2, "pack") == "brier_lm@ctx512/stride8"
    assert measure(512, 3) == "brier_lm@ctx512/stride24"
    assert measure(512, 4, "align") == "brier_lm@ctx512/stride8/align4"


def test_a_window_without_a_place_is_refused():
    with pytest.raises(UserError, match=r"2 positions of 4 tokens has no place .* raise training\.positions"):
        scored_positions(2, 4)
    assert scored_positions(3, 4).tolist() == [1]
