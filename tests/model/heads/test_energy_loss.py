from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from calm_core.model.heads.energy_loss import energy_loss

GOLDEN = Path(__file__).parents[2] / "golden" / "tiny.golden.safetensors"


def problem(positions, batch, samples, draws, runs, latent=5, dtype=torch.float64, seed=0):
    """Random (samples, mean, log_std, target_noise)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x = normal(positions, batch, samples, latent).requires_grad_()
    mean, log_std = normal(positions, batch, latent), 0.3 * normal(positions, batch, latent) - 1
    return x, mean, log_std, normal(runs, batch, draws, latent)


def double_loop(x, mean, log_std, noise, beta):
    """The definition, pair by pair, `[S, B]`."""
    positions, batch, count, _ = x.shape
    width = -(-positions // len(noise))
    rows = []
    for s in range(positions):
        for b in range(batch):
            z = mean[s, b] + log_std[s, b].exp() * noise[s // width, b]
            to_target = sum((x[s, b, n] - z_m).norm() ** beta for n in range(count) for z_m in z)
            between = sum(
                (x[s, b, n] - x[s, b, k]).norm() ** beta for n in range(count) for k in range(count) if n != k
            )
            rows.append(2 / (count * len(z)) * to_target - between / (count * (count - 1)))
    return torch.stack(rows).view(positions, batch)


@settings(max_examples=40, deadline=None)
@given(
    positions=st.integers(1, 7),
    batch=st.integers(1, 3),
    samples=st.integers(2, 5),
    draws=st.integers(1, 6),
    width=st.integers(1, 7),
    beta=st.sampled_from([0.3, 0.5, 1.0, 1.5, 1.9]),
    slice_size=st.sampled_from([1, 40, 10_000]),
)
def test_values_and_gradients_are_those_of_the_definition(positions, batch, samples, draws, width, beta, slice_size):
    x, mean, log_std, noise = problem(positions, batch, samples, draws, runs=-(-positions // width))
    expected = double_loop(x, mean, log_std, noise, beta)
    weights = torch.linspace(0.5, 2, positions * batch, dtype=torch.float64).view(positions, batch)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), x)
    result = energy_loss(x, mean, log_std, noise, beta, slice_size)
    (result.loss * weights).sum().backward()
    torch.testing.assert_close(result.loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x.grad, gradient, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(result.loss, 2 * result.to_target - result.between)
    assert not result.to_target.requires_grad
    assert not result.between.requires_grad


def test_gradcheck():
    x, *target = problem(4, 2, 3, 4, runs=2, latent=3)
    assert torch.autograd.gradcheck(lambda x: energy_loss(x, *target, beta=1.3).loss, x)


def test_without_gradient_the_values_are_the_same():
    x, *target = problem(5, 2, 4, 6, runs=3)
    with torch.no_grad():
        silent = energy_loss(x, *target)
    assert not silent.loss.requires_grad
    for quiet, loud in zip(silent, energy_loss(x, *target), strict=True):
        assert torch.equal(quiet, loud)


@pytest.mark.parametrize("slice_size", [1, 100, 1000])
def test_slices_do_not_change_the_result(slice_size):
    x, *target = problem(10, 3, 4, 8, runs=4, dtype=torch.float32)
    whole = energy_loss(x, *target)
    (expected,) = torch.autograd.grad(whole.loss.sum(), x)
    part = energy_loss(x, *target, slice_size=slice_size)
    (gradient,) = torch.autograd.grad(part.loss.sum(), x)
    torch.testing.assert_close(part.loss, whole.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta", [0.01, 0.5, 1.0, 1.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_finite_where_samples_coincide(beta, dtype):
    x, mean, log_std, noise = problem(3, 2, 4, 5, runs=3, dtype=dtype)
    same = torch.zeros_like(x).requires_grad_()
    on_target = (mean + log_std.exp() * noise[:, :, 0]).unsqueeze(2).expand(x.shape).clone().requires_grad_()
    for samples, spread in [(same, log_std), (on_target, log_std), (same, log_std - 1000)]:
        loss = energy_loss(samples, mean, spread, noise, beta).loss
        (gradient,) = torch.autograd.grad(loss.sum(), samples)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        assert gradient.dtype == dtype


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_coincident_pairs_add_nothing(beta):
    # Every sample and every draw is the posterior mean: no distance anywhere, so neither loss nor pull.
    mean = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(1))
    samples = mean.unsqueeze(2).repeat(1, 1, 3, 1).requires_grad_()
    result = energy_loss(samples, mean, torch.full_like(mean, -1000.0), torch.ones(2, 1, 5, 4), beta)
    result.loss.sum().backward()
    assert torch.equal(result.loss, torch.zeros(2, 1))
    assert torch.equal(samples.grad, torch.zeros_like(samples))


def test_nearly_equal_samples_keep_the_precision_of_their_differences():
    # As when training starts: samples a millionth apart, far from the posterior.
    x, *_ = problem(4, 1, 6, 1, runs=4, dtype=torch.float32)
    samples = x.detach() * 1e-6
    target = torch.full((4, 1, 5), 3.0), torch.zeros(4, 1, 5), torch.ones(4, 1, 2, 5)
    exact = energy_loss(samples.double(), *(part.double() for part in target)).between
    torch.testing.assert_close(energy_loss(samples, *target).between.double(), exact, rtol=1e-5, atol=0)


def test_low_precision_is_raised_to_float32():
    x, mean, log_std, noise = problem(8, 2, 4, 16, runs=2, latent=32, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = energy_loss(x, mean, log_std, noise).loss
    exact = energy_loss(*(part.detach().double() for part in (x, mean, log_std, noise))).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_the_loss_is_least_at_the_true_distribution(beta):
    positions, latent = 3000, 3
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mean, log_std = torch.ones(positions, 1, latent, dtype=torch.float64), torch.full((positions, 1, latent), -0.5)
    noise, draws = normal(positions, 1, 8, latent), normal(positions, 1, 8, latent)

    def expected_loss(shift, scale):
        samples = mean.unsqueeze(2) + shift + scale * log_std.exp().unsqueeze(2) * draws
        return energy_loss(samples, mean, log_std.double(), noise, beta).loss.mean()

    truth = expected_loss(0.0, 1.0)
    for shift, scale in [(0.3, 1.0), (-0.3, 1.0), (0.0, 0.6), (0.0, 1.5), (0.0, 0.0)]:
        assert expected_loss(shift, scale) > truth + 0.005


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_golden_scores(beta):
    golden = load_file(GOLDEN)
    samples = golden["energy/latent_predictions"].transpose(0, 1).unsqueeze(1)
    mean, log_std = (golden[f"energy/target_{name}"].unsqueeze(1) for name in ("mean", "log_std"))
    noise = golden["energy/target_eps"].transpose(0, 1).unsqueeze(1)
    score, expected = (
        -energy_loss(samples, mean, log_std, noise, beta).loss.squeeze(1),
        golden[f"energy/score_beta{beta}"],
    )
    error = ((score - expected).abs().max() / expected.abs().max()).item()
    print(f"energy score, beta {beta}: largest difference {error:.1e} of the largest value")
    assert error <= 1e-5


def test_shapes_that_do_not_fit_are_refused():
    x, mean, log_std, noise = problem(6, 2, 3, 4, runs=3)
    for arguments in [
        (x[:, :, :1], mean, log_std, noise),
        (x, mean[:5], log_std, noise),
        (x, mean, log_std, noise[:, :1]),
        (x, mean, log_std, noise.repeat(2, 1, 1, 1)[:5]),  # no runs of equal length make 5 of 6 positions
        (x, mean, log_std, noise, 2.0),
    ]:
        with pytest.raises(ValueError, match=r"energy loss|mean|target_noise"):
            energy_loss(*arguments)
