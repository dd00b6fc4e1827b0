import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from calm_core.model.heads.diffusion import (
    Schedule,
    Step,
    bounded,
    diffused,
    diffusion_losses,
    log_bin_probability,
    sample,
    step_back,
)

L = 3


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_cosine_levels_are_the_closed_form_until_the_last_step():
    signal = Schedule.cosine(1000).signal
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    expected = ((t + 0.008) / 1.008 * math.pi / 2).cos() ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(signal[:-1], expected[:-1])
    assert signal[-1] == pytest.approx(0.001 * signal[-2].item())  # the closed form would end at 0


def test_a_respaced_schedule_has_the_same_levels_at_the_times_it_keeps():
    whole = Schedule.cosine(1000)
    part = whole.respaced(100)
    assert len(part.time) == 100
    assert (part.time[0], part.time[-1]) == (0, 999)
    assert set(part.time.diff().tolist()) == {10, 11}
    assert torch.equal(part.signal, whole.signal[part.time])
    assert torch.equal(whole.respaced(1000).time, whole.time)


def test_levels_keep_the_shape_of_t():
    level = Schedule.cosine(10).at(torch.tensor([[0, 3], [9, 0]]))
    assert all(field.shape == (2, 2, 1) for field in level)
    assert level.first.flatten().tolist() == [True, False, False, True]


def test_diffused_latents_have_the_level_of_the_schedule():
    schedule = Schedule.cosine(20)
    noise = draws(50_000, 1)
    for t in (0, 10, 19):
        x_t = diffused(schedule.at(torch.tensor(t)), torch.full_like(noise, 2.0), noise)
        assert x_t.mean().item() == pytest.approx(2 * schedule.signal[t].sqrt().item(), abs=0.02)
        assert x_t.var().item() == pytest.approx(1 - schedule.signal[t].item(), abs=0.02)


def true_step(schedule: Schedule, t: int, x0: Tensor, x_t: Tensor) -> Normal:
    """q(x_{t-1} | x_t, x_0) by multiplying the densities q(x_t | x_{t-1}) and q(x_{t-1} | x_0)."""
    before, now = schedule.signal[t - 1], schedule.signal[t]
    kept = now / before
    precision = kept / (1 - kept) + 1 / (1 - before)
    mean = (kept.sqrt() * x_t / (1 - kept) + before.sqrt() * x0 / (1 - before)) / precision
    return Normal(mean, precision**-0.5)


@pytest.mark.parametrize("t", [1, 2, 30, 49])
def test_the_bound_is_the_divergence_from_the_true_step(t):
    schedule = Schedule.cosine(50)
    x0, noise, output = draws(4, L), draws(4, L, seed=1), draws(4, 2 * L, seed=2)
    level = schedule.at(torch.full((4,), t))
    x_t = diffused(level, x0, noise)
    step = step_back(level, x_t, output)
    truth, ours = true_step(schedule, t, x0, x_t), Normal(step.mean, (step.log_variance / 2).exp())
    error, bound = diffusion_losses(level, x0, noise, output)
    torch.testing.assert_close(bound, kl_divergence(truth, ours).mean(-1) / math.log(2))
    torch.testing.assert_close(error, (output[:, :L] - noise).square().mean(-1))


def test_a_network_that_knows_the_noise_takes_the_true_step():
    schedule = Schedule.cosine(50)
    x0, noise, t = draws(4, L), draws(4, L, seed=1), 20
    level = schedule.at(torch.full((4,), t))
    output = torch.cat([noise, -torch.ones(4, L)], -1)  # v = -1: the variance of the true step
    step, truth = step_back(level, x_t := diffused(level, x0, noise), output), true_step(schedule, t, x0, x_t)
    torch.testing.assert_close(step.mean, truth.mean)
    torch.testing.assert_close((step.log_variance / 2).exp(), truth.stddev.expand(4, L))
    torch.testing.assert_close(diffusion_losses(level, x0, noise, output)[1], torch.zeros(4).double())


def test_the_last_step_is_scored_by_the_probability_of_a_bin():
    level = Schedule.cosine(50).at(torch.zeros(4, dtype=torch.int64))
    x0, noise, output = draws(4, L), draws(4, L, seed=1), draws(4, 2 * L, seed=2)
    x0[0] = torch.tensor([-2.0, 0.5, 2.0])
    step = step_back(level, diffused(level, x0, noise), output)
    normal = Normal(step.mean, (step.log_variance / 2).exp())
    below = torch.where(x0 < -0.999, 0.0, normal.cdf(x0 - 1 / 255))
    above = torch.where(x0 > 0.999, 1.0, normal.cdf(x0 + 1 / 255))
    torch.testing.assert_close(log_bin_probability(x0, step).exp(), above - below, atol=2e-3, rtol=0.02)
    expected = -log_bin_probability(x0, step).mean(-1) / math.log(2)
    torch.testing.assert_close(diffusion_losses(level, x0, noise, output)[1], expected)


def test_an_impossible_value_has_a_finite_gradient():
    mean = torch.zeros(1, requires_grad=True, dtype=torch.float64)
    log_bin_probability(torch.tensor([0.9], dtype=torch.float64), Step(mean, torch.full((1,), -20.0))).backward()
    assert mean.grad.isfinite().all()


def test_the_bound_teaches_the_variance_and_not_the_noise():
    level = Schedule.cosine(50).at(torch.tensor([0, 7]))
    output = draws(2, 2 * L).requires_grad_()
    diffusion_losses(level, draws(2, L, seed=1), draws(2, L, seed=2), output)[1].sum().backward()
    assert (output.grad[:, :L] == 0).all()
    assert (output.grad[:, L:] != 0).all()


@pytest.mark.parametrize("v", [-1.0, 1.0])
def test_samples_follow_the_distribution_that_the_network_knows(v):
    """Data from N(2, 0.5): the best estimate of the noise is linear in x_t."""
    whole = Schedule.cosine(1000)
    mean, spread = 2.0, 0.5

    def network(x: Tensor, time: Tensor) -> Tensor:
        s = whole.signal[time]
        noise = (1 - s).sqrt() * (x - s.sqrt() * mean) / (s * spread**2 + 1 - s)
        return torch.cat([noise, torch.full_like(x, v)], -1)

    seen = []

    def noise(t: int) -> Tensor:
        seen.append(t)
        return draws(20_000, 1, seed=t)

    x = sample(whole.respaced(100), network, draws(20_000, 1), noise, bound=10.0)
    assert seen == list(range(99, 0, -1))
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.std().item() == pytest.approx(spread, rel=0.05)


def test_the_bound_moves_only_what_lies_beyond_it():
    schedule = Schedule.cosine(50)
    x0, noise = torch.tensor([[-30.0, -9.0, 0.5, 11.0]]).double(), draws(1, 4)
    level = schedule.at(torch.tensor([40]))
    x_t = diffused(level, x0, noise)
    output = torch.cat([noise, draws(1, 4, seed=1)], -1)
    moved = bounded(level, x_t, output, 10.0)
    implied = (x_t - (1 - level.signal).sqrt() * moved[:, :4]) / level.signal.sqrt()
    torch.testing.assert_close(implied, x0.clamp(-10, 10))
    torch.testing.assert_close(moved[:, [1, 2]], noise[:, [1, 2]])
    assert torch.equal(moved[:, 4:], output[:, 4:])


def test_samples_of_a_network_that_knows_nothing_stay_within_the_bound():
    schedule = Schedule.cosine(1000).respaced(100)
    x = sample(schedule, lambda x, time: torch.zeros(64, 2), draws(64, 1), lambda t: draws(64, 1, seed=t), bound=5.0)
    assert x.abs().max() <= 5.0
