from itertools import product
from math import comb

import pytest
import torch
from torch import Tensor

from calm_core.errors import UserError
from calm_core.evaluation.brier import (
    autoregressive_brier_terms,
    brier_terms,
    effective_draws,
    variance_parts,
    weighted_brier_terms,
    weighted_within_variance,
    within_variance,
)

# Two tokens, the second depends on the first: P over {0, 1, 2} x {0, 1, 2}.
JOINT = torch.tensor([[0.30, 0.05, 0.05], [0.02, 0.28, 0.10], [0.10, 0.05, 0.05]], dtype=torch.float64)


def every_tuple(distribution: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """All tuples of `count` outcomes `[tuples, count]` of a categorical, and the probability of each."""
    outcomes = torch.tensor(list(product(range(len(distribution)), repeat=count)))
    return outcomes, distribution[outcomes].prod(-1)


def exact_brier(truth: tuple[int, int]) -> Tensor:
    first, both = JOINT.sum(1), JOINT
    return torch.stack(
        [2 * first[truth[0]] - first.square().sum(), 2 * both[truth] - both.square().sum()],
    )


@pytest.mark.parametrize("truth", [(0, 0), (1, 0), (2, 1)])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_expectation_over_every_draw_is_brier_n(truth: tuple[int, int], count: int) -> None:
    outcomes, probability = every_tuple(JOINT.flatten(), count)
    samples = torch.stack([outcomes // 3, outcomes % 3], dim=-1)
    score = brier_terms(samples, torch.tensor(truth).expand(len(samples), 2)).score
    torch.testing.assert_close(probability @ score, exact_brier(truth), atol=1e-13, rtol=0)


def test_within_variance_is_unbiased() -> None:
    outcomes, probability = every_tuple(JOINT.flatten(), 4)
    samples, truth = torch.stack([outcomes // 3, outcomes % 3], dim=-1), torch.tensor([0, 0])
    score = brier_terms(samples, truth.expand(len(samples), 2)).score
    variance = probability @ score.square() - (probability @ score).square()
    estimate = within_variance(samples, truth.expand(len(samples), 2))
    torch.testing.assert_close(probability @ estimate, variance, atol=1e-13, rtol=0)


def variance_over_every_draw(p: float, truth: int, count: int) -> float:
    """Variance of the score for P = (p, 1 - p), summed over how many of the N samples are 0."""
    samples = (torch.arange(count) >= torch.arange(count + 1).unsqueeze(1)).long().unsqueeze(-1)
    binomial = [comb(count, z) * p**z * (1 - p) ** (count - z) for z in range(count + 1)]
    probability = torch.tensor(binomial, dtype=torch.float64)
    score = brier_terms(samples, torch.full((count + 1, 1), truth)).score[:, 0]
    return float(probability @ score.square() - (probability @ score).square())


@pytest.mark.parametrize("p", [0.5, 0.9, 0.01])
@pytest.mark.parametrize(("count", "bound"), [(8, 0.2), (32, 0.05)])
def test_variance_falls_as_theory_says_where_the_truth_follows_the_samples(p: float, count: int, bound: float) -> None:
    def mean_over_truth(count: int) -> float:
        return p * variance_over_every_draw(p, 0, count) + (1 - p) * variance_over_every_draw(p, 1, count)

    ratio = mean_over_truth(count) / mean_over_truth(2)
    assert ratio == pytest.approx(2 * (2 * count - 1) / (3 * count * (count - 1)), rel=1e-9)
    assert ratio <= bound


def test_variance_parts_tell_samples_from_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    # Half the positions are certain and right (score 1), half uniform over four tokens (score 2/4 - 1/4).
    uniform = torch.randint(4, (20_000, 8, 1), generator=generator)
    samples = torch.cat([torch.zeros_like(uniform), uniform])
    truth = torch.zeros(len(samples), 1, dtype=torch.int64)
    parts = variance_parts(brier_terms(samples, truth).score, within_variance(samples, truth))
    # Over two samples the uniform part has variance 9/16; N = 8 leaves 5/28 of it.
    within = 9 / 16 * 5 / 28 / 2
    assert parts.within.item() == pytest.approx(within, rel=0.03)
    assert parts.between.item() == pytest.approx((0.75 / 2) ** 2, rel=0.02)


def test_prefixes_of_one_to_four_tokens_by_hand() -> None:
    samples = torch.tensor([[1, 2, 3, 4, 9], [1, 2, 3, 5, 9], [1, 2, 0, 4, 9]])
    terms = brier_terms(samples, torch.tensor([1, 2, 3, 4, 8]))
    torch.testing.assert_close(terms.hit, torch.tensor([3, 3, 2, 1]) / 3.0, check_dtype=False)
    torch.testing.assert_close(terms.collision, torch.tensor([3, 3, 1, 0]) / 3.0, check_dtype=False)


def test_short_chunks_give_what_they_define_and_one_sample_is_refused() -> None:
    assert brier_terms(torch.zeros(5, 6, 2, dtype=torch.int32), torch.zeros(5, 2)).score.shape == (5, 2)
    with pytest.raises(UserError, match="at least 2 samples"):
        brier_terms(torch.zeros(5, 1, 2), torch.zeros(5, 2))
    with pytest.raises(UserError, match="at least 4 samples"):
        within_variance(torch.zeros(5, 3, 2), torch.zeros(5, 2))


def test_autoregressive_terms_have_the_same_expectation() -> None:
    first = JOINT.sum(1)

    def log_probabilities(x: int, y: int) -> list[float]:
        return [float(first[x].log()), float((JOINT[x, y] / first[x]).log())]

    rollouts = [(x, y) for x in range(3) for y in range(3)]
    rollout = torch.tensor([log_probabilities(*pair) for pair in rollouts], dtype=torch.float64)
    truth = torch.tensor(log_probabilities(1, 2), dtype=torch.float64).expand_as(rollout)
    score = autoregressive_brier_terms(truth, rollout.unsqueeze(1)).score
    torch.testing.assert_close(JOINT.flatten() @ score, exact_brier((1, 2)), atol=1e-13, rtol=0)


def test_equal_weights_change_nothing() -> None:
    samples = torch.randint(3, (50, 6, 4), generator=torch.Generator().manual_seed(0))
    truth, equal = samples[:, 0], torch.full((50, 6), -700.0, dtype=torch.float64)
    weighted, plain = weighted_brier_terms(samples, truth, equal), brier_terms(samples, truth)
    torch.testing.assert_close(weighted.hit, plain.hit)
    torch.testing.assert_close(weighted.collision, plain.collision)
    torch.testing.assert_close(effective_draws(equal), torch.full((50,), 6.0, dtype=torch.float64))


def weighted_draws(draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Second tokens `[1000, N, 1]` of draws from JOINT, weighted as by a decoder that is 95 % sure of the first, 1."""
    outcomes = JOINT.flatten().multinomial(1000 * draws, replacement=True, generator=generator).view(1000, draws)
    log_weights = torch.tensor([0.025, 0.95, 0.025], dtype=torch.float64).log()[outcomes // 3]
    return (outcomes % 3).unsqueeze(-1), log_weights


def test_weighted_terms_tend_to_those_of_the_conditional_distribution() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.tensor([0.025, 0.95, 0.025], dtype=torch.float64)
    conditional = weights @ JOINT / (weights @ JOINT).sum()
    exact = 2 * conditional[2] - conditional.square().sum()
    biases = []
    for draws in (8, 32, 64):
        samples, log_weights = weighted_draws(draws, generator)
        truth = torch.full((1000, 1), 2)
        score = weighted_brier_terms(samples, truth, log_weights).score[:, 0]
        biases.append(abs(score.mean() - exact).item())
        # The estimated variance is that of the scores over redrawn samples, once a few draws are effective.
        ratio = weighted_within_variance(samples, truth, log_weights).mean() / score.var()
        assert 0.8 < ratio < 1.2 if draws > 8 else 0.4 < ratio < 1
    assert biases[2] < biases[0] / 2


def test_a_single_draw_that_outweighs_all_others_leaves_finite_terms() -> None:
    samples = torch.tensor([[[1], [2], [3]]])
    terms = weighted_brier_terms(samples, torch.tensor([[1]]), torch.tensor([[0.0, -2000.0, -3000.0]]).double())
    assert (terms.hit.item(), terms.collision.item()) == (1, 0)
