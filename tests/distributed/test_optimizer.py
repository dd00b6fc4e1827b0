import json
import math
import random
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from calm_core.config.training_config import ScheduleConfig, SpikeConfig
from calm_core.distributed.optimizer import UpdateHistory, Verdict, buckets, judge, learning_rate_factor, limit
from calm_core.errors import UserError
from calm_core.training.resume import RunProgress


def factors(steps: int, **options: object) -> list[float]:
    return [learning_rate_factor(step, steps, ScheduleConfig(**options)) for step in range(steps)]


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    assert factors(6, kind="constant", warmup=3) == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 1])
    assert factors(3, kind="constant", warmup=0) == [1, 1, 1]


def test_cosine() -> None:
    found = factors(13, kind="cosine", warmup=2, floor=0.1)
    wanted = [0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 10)) / 2 for step in range(2, 13)]
    assert found == pytest.approx([1 / 3, 2 / 3, *wanted])
    assert found[-1] == pytest.approx(0.1)


def test_warmup_stable_decay() -> None:
    found = factors(11, kind="wsd", warmup=2, decay=0.4, floor=0.5)
    # 60 % of 11 steps are 7: stable to there, then straight down to the last.
    assert found == pytest.approx([1 / 3, 2 / 3, *[1] * 6, 1 - 0.5 / 3, 1 - 1 / 3, 0.5])


@given(
    st.sampled_from(["constant", "cosine", "wsd"]),
    st.integers(1, 60),
    st.integers(0, 80),
    st.floats(0.01, 1),
    st.floats(0, 1),
)
def test_it_rises_once_then_never_again(kind: str, steps: int, warmup: int, decay: float, floor: float) -> None:
    found = factors(steps, kind=kind, warmup=warmup, decay=decay, floor=floor)
    assert all(0 <= factor <= 1 for factor in found)
    rising, falling = found[: warmup + 1], found[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(
    "options", [{"kind": "linear"}, {"warmup": -1}, {"kind": "wsd", "decay": 0.0}, {"kind": "cosine", "floor": 1.5}]
)
def test_bad_schedules(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match="schedule"):
        ScheduleConfig(**options)


SKIP = SpikeConfig(action="skip", window=8, deviations=6.0)
finite = st.floats(-1e6, 1e6)


def calm(count: int, seed: int = 0) -> list[tuple[float, float]]:
    """Losses about 5 ± 0.1 and norms about 2 ± 0.2."""
    draw = random.Random(seed)
    return [(draw.gauss(5, 0.1), draw.gauss(2, 0.2)) for _ in range(count)]


def test_a_high_loss_or_norm_is_a_spike_and_a_low_one_is_not() -> None:
    recent = calm(8)
    assert judge(5.0, 2.0, recent, SKIP) == Verdict.GOOD
    assert judge(7.0, 2.0, recent, SKIP) == Verdict.SPIKE
    assert judge(5.0, 9.0, recent, SKIP) == Verdict.SPIKE
    assert judge(0.0, 0.0, recent, SKIP) == Verdict.GOOD


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (-math.inf, 1.0)])
def test_what_is_not_finite_is_no_spike(loss: float, norm: float) -> None:
    assert judge(loss, norm, calm(8), SKIP) == judge(loss, norm, [], SpikeConfig()) == Verdict.NOT_FINITE


def test_without_half_a_window_nothing_is_a_spike() -> None:
    assert judge(1e9, 1e9, calm(3), SKIP) == Verdict.GOOD
    assert judge(1e9, 1e9, calm(4), SKIP) == Verdict.SPIKE
    assert judge(1e9, 1e9, calm(128), SpikeConfig()) == Verdict.GOOD


def test_a_few_wild_values_do_not_move_the_limit_far() -> None:
    recent = calm(100)
    wild = [(1e9, 1e9)] * 10
    before, after = (limit([loss for loss, _ in values], 6.0) for values in (recent, recent[10:] + wild))
    assert after == pytest.approx(before, abs=0.3)


def test_the_deviation_is_that_of_a_normal_distribution() -> None:
    draw = random.Random(1)
    assert limit([draw.gauss(3, 0.5) for _ in range(20_000)], 4.0) == pytest.approx(3 + 4 * 0.5, abs=0.05)


def test_equal_values_leave_room_for_rounding() -> None:
    recent = [(2.0, 1.0)] * 8
    assert judge(2.0001, 1.0001, recent, SKIP) == Verdict.GOOD
    assert judge(2.1, 1.0, recent, SKIP) == Verdict.SPIKE


@given(st.lists(st.tuples(st.sampled_from(list(Verdict)), finite, finite), max_size=40), st.integers(1, 9))
def test_the_history_counts_every_verdict_and_remembers_the_good_ones(
    steps: list[tuple[Verdict, float, float]], remembered: int
) -> None:
    progress, history = RunProgress(), UpdateHistory()
    for verdict, loss, norm in steps:
        progress, history = progress.after(4), history.after(verdict, loss, norm, remembered)
        saved = json.loads(json.dumps({**asdict(progress), **asdict(history)}))
        assert UpdateHistory.restored(saved) == history
    good = [(loss, norm) for verdict, loss, norm in steps if verdict == Verdict.GOOD]
    assert history.recent == tuple(good[-remembered:])
    assert (progress.step, progress.consumed, history.updates) == (len(steps), 4 * len(steps), len(good))
    assert history.spikes == [verdict for verdict, *_ in steps].count(Verdict.SPIKE)


def test_without_a_detector_nothing_is_remembered() -> None:
    assert UpdateHistory().after(Verdict.GOOD, 1.0, 1.0, SpikeConfig().remembered).recent == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"action": "warn"}, r"spikes\.action='warn' is unknown: choose off, skip or stop"),
        ({"window": 3}, r"spikes\.window=3 must be at least 4"),
        ({"deviations": 0.0}, r"spikes\.deviations=0\.0 must be above 0"),
        ({"in_a_row": 0}, r"spikes\.in_a_row=0"),
    ],
)
def test_settings_that_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SpikeConfig(**change)


def test_buckets_hold_parameters_of_one_kind_the_last_ones_first() -> None:
    def parameter(*shape: int, **marks: bool) -> nn.Parameter:
        made = nn.Parameter(torch.zeros(shape))
        made.__dict__.update(marks)
        return made

    first, second, third = (parameter(2, size, tensor_model_parallel=True) for size in (50, 3, 3))
    whole, bias, norm = parameter(2, 3), parameter(5), parameter(4, sequence_parallel=True)
    found = buckets([first, bias, norm, second, whole, third], size=12)
    # The two small matrices fill a bucket; what waits for a sum over tensor-parallel ranks is last.
    wanted = [[third, second], [first], [whole], [bias], [norm]]
    assert [[id(p) for p in members] for members in found] == [[id(p) for p in members] for members in wanted]
    assert len(buckets([first, second], size=1)) == 2
    assert len(buckets([first, second], size=10**9)) == 1
