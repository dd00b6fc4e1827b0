from itertools import product
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calm_core.errors import UserError
from calm_core.evaluation.brier import (
    BrierAccumulator,
    ClusteredMean,
    autoregressive_brier_terms,
    brier_lm,
    brier_terms,
    clustered_mean,
    effective_draws,
    interval_factor,
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


def test_standard_error_is_the_spread_of_document_means_when_documents_are_equally_long() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(30, 1, 2, generator=generator) + 0.1 * torch.randn(30, 7, 2, generator=generator)
    result = clustered_mean(values.flatten(0, 1).double(), torch.arange(30).repeat_interleave(7) * 10**12)
    means = values.double().mean(1)
    torch.testing.assert_close(result.mean, means.mean(0))
    torch.testing.assert_close(result.standard_error, means.std(0) / 30**0.5)
    assert (result.positions, result.clusters) == (210, 30)


def test_one_document_has_no_standard_error() -> None:
    result = clustered_mean(torch.ones(5, 4), torch.zeros(5, dtype=torch.int64))
    assert result.mean.tolist() == [1, 1, 1, 1]
    assert result.standard_error.isnan().all()
    assert "two documents" in brier_lm(result).reason


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-8, 8)), min_size=1, max_size=40), st.integers(1, 4))
def test_merging_parts_equals_the_whole(rows: list[tuple[int, int]], ranks: int) -> None:
    clusters = torch.tensor([row[0] for row in rows])
    values = torch.tensor([[row[1] / 8, row[1] ** 2 / 64] for row in rows])  # exact in binary
    merged = BrierAccumulator(2)
    for rank in range(ranks):
        part = BrierAccumulator(2)
        for start in range(rank, len(rows), 2 * ranks):
            batch = slice(start, start + ranks + 1, ranks)
            part.add(values[batch], clusters[batch])
        merged.merge(part.state())
    whole = clustered_mean(values, clusters)
    result = merged.result()
    assert result.positions == whole.positions == len(rows)
    assert torch.equal(result.mean, whole.mean)
    assert torch.equal(result.covariance.nan_to_num(), whole.covariance.nan_to_num())


def test_a_constant_wrong_predictor_scores_none_not_100() -> None:
    samples, truth = torch.zeros(50, 8, 4, dtype=torch.int64), torch.ones(50, 4, dtype=torch.int64)
    scores = brier_terms(samples, truth).score
    assert torch.equal(scores, -torch.ones_like(scores))
    result = brier_lm(clustered_mean(scores, torch.arange(50)))
    assert (result.value, result.standard_error) == (None, None)
    assert "Brier-1, Brier-2, Brier-3, Brier-4" in result.reason


def test_brier_lm_names_the_score_that_is_not_significant() -> None:
    covariance = torch.diag(torch.tensor([0.01, 0.01, 0.01, 0.06]) ** 2).double()
    brier = ClusteredMean(torch.tensor([0.4, 0.3, 0.2, 0.1]).double(), covariance, positions=100, clusters=10)
    assert brier_lm(brier).reason.endswith("standard errors: Brier-4.")
    assert "only 3" in brier_lm(ClusteredMean(brier.mean[:3], covariance[:3, :3], 100, 10)).reason


def test_brier_lm_value_and_delta_method() -> None:
    generator = torch.Generator().manual_seed(2)
    mean = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    root = 0.003 * torch.randn(4, 4, generator=generator, dtype=torch.float64)
    result = brier_lm(ClusteredMean(mean, root @ root.mT, positions=100, clusters=10))
    assert result.value == pytest.approx(100 * (0.4 * 0.3 * 0.2 * 0.1) ** 0.25)
    draws = mean + torch.randn(40_000, 4, generator=generator, dtype=torch.float64) @ root.mT
    spread = (100 * draws.prod(-1) ** 0.25).std().item()
    assert result.standard_error == pytest.approx(spread, rel=0.03)
    perfect = clustered_mean(torch.ones(6, 4), torch.arange(6))
    assert brier_lm(perfect) == (pytest.approx(100), 0.0, None)


def coverage(documents: int, unequal: float, trials: int = 1000) -> tuple[float, float]:
    """How often intervals by Student's t, and normal ones, cover the mean of documents that differ, as positions do."""
    random, covered, normal = np.random.default_rng(documents), 0, 0
    for _ in range(trials):
        lengths = np.maximum(1, 20 * np.exp(unequal * random.standard_normal(documents))).astype(int)
        own = np.repeat(random.standard_normal(documents), lengths)
        values = torch.from_numpy(own + 2 * random.standard_normal(len(own)))
        result = clustered_mean(values.unsqueeze(1), torch.from_numpy(np.repeat(np.arange(documents), lengths)))
        distance = (result.mean.abs() / result.standard_error).item()
        covered += distance < interval_factor(result.clusters)
        normal += distance < 1.96
    return covered / trials, normal / trials


@pytest.mark.parametrize("documents", [3, 5, 10])
def test_intervals_by_students_t_cover_what_they_say_and_normal_ones_do_not(documents: int) -> None:
    covered, normal = coverage(documents, unequal=0)
    assert covered == pytest.approx(0.95, abs=0.02)
    assert normal < {3: 0.84, 5: 0.90, 10: 0.94}[documents]
    covered, normal = coverage(documents, unequal=0.5)  # lengths vary by half
    assert covered > 0.91
    assert normal < covered - 0.01


def test_intervals_by_blocks_of_a_single_document_cover_what_they_say() -> None:
    """Neighbouring positions are alike: 16 windows of 8 short blocks, correlated over about four of these."""
    random, covered, trials = np.random.default_rng(0), 0, 1000
    for _ in range(trials):
        noise = random.standard_normal(132)
        values = sum(noise[lag : lag + 128] for lag in range(4)) / 2 + random.standard_normal((3, 128))
        accumulator = BrierAccumulator(1)
        blocks = torch.arange(128).repeat(3)
        accumulator.add(torch.from_numpy(values).view(-1, 1), torch.zeros_like(blocks), blocks=blocks)
        result = accumulator.result()
        covered += (result.mean.abs() < interval_factor(result.clusters) * result.standard_error).item()
    assert (result.unit, result.clusters, result.documents) == ("blocks", 32, 1)
    assert covered / trials == pytest.approx(0.9, abs=0.05)


def test_few_documents_need_more_standard_errors_to_be_significant() -> None:
    covariance = torch.eye(4).double() * 0.01**2
    brier = torch.tensor([0.4, 0.3, 0.2, 0.035]).double()  # 3.5 standard errors
    assert brier_lm(ClusteredMean(brier, covariance, positions=100, clusters=10)).value is not None
    reason = brier_lm(ClusteredMean(brier, covariance, positions=100, clusters=3)).reason
    assert reason == "Not above zero by 4.3 standard errors: Brier-4."
    many = ClusteredMean(torch.tensor([0.4, 0.3, 0.2, 0.0197]).double(), covariance, positions=100, clusters=10**6)
    assert "by 2 standard errors" in brier_lm(many).reason


def test_documents_without_a_counted_position_are_no_clusters() -> None:
    accumulator = BrierAccumulator(1)
    counted = torch.tensor([[True], [True], [False]])
    accumulator.add(torch.tensor([[1.0], [2.0], [9.0]]), torch.tensor([3, 4, 5]), counted)
    assert accumulator.result().clusters == accumulator.result().documents == 2


def test_a_score_that_does_not_count_leaves_no_trace():
    torch.manual_seed(0)
    values, documents = torch.randn(40, 2, dtype=torch.float64), torch.arange(40) % 5
    counted = torch.stack([torch.ones(40, dtype=torch.bool), torch.rand(40) < 0.6], 1)
    accumulator = BrierAccumulator(2)
    accumulator.add(values.where(counted, torch.nan), documents, counted)
    found = accumulator.result()
    for column in range(2):
        chosen = counted[:, column]
        alone = clustered_mean(values[chosen][:, column : column + 1], documents[chosen])
        assert torch.allclose(found.mean[column], alone.mean[0])
        assert torch.allclose(found.standard_error[column], alone.standard_error[0])
    assert found.positions == 40
