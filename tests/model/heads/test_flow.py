import math

import pytest
import torch
from torch import Tensor

from calm_core.model.heads.flow import flow_loss, midpoint, on_the_line


def test_the_line_runs_from_noise_to_data_at_its_velocity():
    source, target = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t, expected in ((0.0, source), (1.0, target), (0.25, 0.75 * source + 0.25 * target)):
        torch.testing.assert_close(on_the_line(torch.full((5,), t).double(), source, target), expected)
    early, late = (on_the_line(torch.full((5,), t).double(), source, target) for t in (0.5, 0.75))
    velocity = (late - early) / 0.25
    torch.testing.assert_close(flow_loss(velocity, source, target), torch.zeros(5).double())
    torch.testing.assert_close(flow_loss(velocity + 2, source, target), torch.full((5,), 4.0).double())


def error_of_midpoint(steps: int) -> float:
    """dx/dt = x cos(t) from 1: x(1) = exp(sin(1))."""
    start = torch.ones(1, dtype=torch.float64)
    return abs(midpoint(lambda x, t: x * math.cos(t), start, steps).item() - math.exp(math.sin(1)))


def test_midpoint_is_of_second_order():
    for steps in (10, 20, 40):
        assert error_of_midpoint(steps) / error_of_midpoint(2 * steps) == pytest.approx(4, rel=0.2)


def test_midpoint_evaluates_at_the_ends_and_the_middles():
    times: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return torch.ones_like(x)

    assert midpoint(velocity, torch.zeros(1), steps=10).item() == pytest.approx(1)
    assert [round(1000 * t, 9) for t in times] == [50 * i for i in range(20)]
    assert [int(torch.full((), 1000 * t).floor()) for t in times] == [50 * i for i in range(20)]
