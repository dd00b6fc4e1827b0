import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_core.config.training_config import ScheduleConfig
from calm_core.distributed.optimizer import learning_rate_factor
from calm_core.errors import UserError


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
