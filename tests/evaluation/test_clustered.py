import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calm_core.evaluation.brier import brier_terms
from calm_core.evaluation.clustered import BrierAccumulator, ClusteredMean, brier_lm, clustered_mean, interval_factor


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
