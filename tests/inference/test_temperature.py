import math
from collections import Counter
from itertools import combinations, pairwise, product

import pytest
import torch
from torch import Tensor

from calm_core.errors import UserError
from calm_core.inference.temperature import (
    CallLimitError,
    agreeing_tuples,
    chunk_weights,
    estimate_calls,
    expected_calls,
    sample_batch,
    sample_exact,
    sample_weighted,
)

P = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
# Chunks that agree in their first token, or in their last, but are different.
CHUNKS = torch.tensor([[1, 2, 3], [1, 2, 4], [5, 2, 3], [1, 0, 3]])


def categorical(count: int, generator: torch.Generator) -> Tensor:
    return CHUNKS[torch.multinomial(P, count, replacement=True, generator=generator)]


def tempered(temperature: float) -> Tensor:
    return P ** (1 / temperature) / (P ** (1 / temperature)).sum()


def indices(chunks: Tensor) -> Tensor:
    """Which of `CHUNKS` each row of `[count, 3]` is."""
    return (chunks.unsqueeze(1) == CHUNKS).all(-1).long().argmax(-1)


def chi_square_tail(observed: Tensor, expected: Tensor) -> float:
    """Probability of a fit as bad as this if `expected` counts are true."""
    statistic = ((observed - expected).square() / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


@pytest.mark.parametrize("temperature", [1, 1 / 2, 1 / 3, 0.4, 0.75])
def test_exact_samples_follow_the_tempered_distribution_at_the_expected_cost(temperature: float) -> None:
    generator, runs = torch.Generator().manual_seed(0), 5000
    samples = [sample_exact(categorical, temperature, generator, max_calls=10_000, block=4) for _ in range(runs)]
    counts = indices(torch.stack([sample.tokens for sample in samples])).bincount(minlength=4)
    assert chi_square_tail(counts, runs * tempered(temperature)) > 0.01
    assert chi_square_tail(counts, runs * tempered(0.85 * temperature)) < 0.01  # the test can tell
    calls = torch.tensor([sample.calls for sample in samples], dtype=torch.float64)
    error = calls.std().item() / math.sqrt(runs)
    assert calls.mean().item() == pytest.approx(expected_calls(P, temperature), abs=3 * error + 1e-9)


@pytest.mark.parametrize("whole", [1, 2, 3])
def test_sets_of_draws_that_agree_weigh_the_products_of_their_weights(whole: int) -> None:
    generator = torch.Generator().manual_seed(0)
    samples, log_weights = categorical(9, generator), 2 * torch.randn(9, generator=generator)
    chunks, agreeing, among_all = agreeing_tuples(samples, log_weights, whole)
    weights = log_weights.double().softmax(0)
    for m in range(whole + 1):
        products = {one: weights[list(one)].prod().item() for one in combinations(range(9), m)}
        assert among_all[m].item() == pytest.approx(sum(products.values()))
        for chunk, weight in zip(chunks, agreeing[:, m], strict=True):
            own = [p for one, p in products.items() if (samples[list(one)] == chunk).all()]
            assert weight.item() == pytest.approx(sum(own))


def test_a_heavy_draw_does_not_agree_with_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    log_weights = torch.tensor([0.0, -1.0, -2.0, -math.inf])
    found = [sample_weighted(CHUNKS, log_weights, 1 / 2, generator) for _ in range(2000)]
    assert {int(sample.agreement) for sample in found} == {1}
    counts = indices(torch.stack([sample.tokens for sample in found])).bincount(minlength=4)
    assert counts[3] == 0
    assert chi_square_tail(counts[:3], 2000 * log_weights[:3].double().softmax(0)) > 0.01
    assert estimate_calls(CHUNKS, 1 / 2, log_weights) == math.inf
    assert sample_weighted(CHUNKS[[0, 1, 1]], log_weights[:3], 1 / 2, generator).tokens.tolist() == CHUNKS[1].tolist()


@pytest.mark.parametrize("temperature", [1 / 2, 0.4])
def test_weighted_draws_foretell_the_calls_of_what_they_stand_for(temperature: float) -> None:
    """Draws of a uniform distribution, weighed by P."""
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(4, (3000,), generator=generator)
    estimate = estimate_calls(CHUNKS[which], temperature, P[which].log())
    assert estimate == pytest.approx(expected_calls(P, temperature), rel=0.05)


def test_expected_calls_by_hand() -> None:
    assert expected_calls(P, 1) == pytest.approx(1)
    assert expected_calls(P, 0.5) == pytest.approx(2 / 0.3)
    assert expected_calls(torch.full((8,), 1 / 8), 1 / 3) == pytest.approx(3 * 8**2)
    assert expected_calls(torch.tensor([1.0, 0.0]), 0.3) == pytest.approx(4)  # 1/T = 3.33: three draws and one more
    assert expected_calls(P, 1 - 1e-6) == pytest.approx(1 + len(P), rel=1e-4)


@pytest.mark.parametrize("temperature", [1, 0.5, 1 / 3, 0.4, 0.75])
def test_calls_are_estimated_from_draws(temperature: float) -> None:
    samples = categorical(20_000, torch.Generator().manual_seed(0))
    assert estimate_calls(samples, temperature) == pytest.approx(expected_calls(P, temperature), rel=0.03)
    assert estimate_calls(CHUNKS, 0.5) == math.inf


def test_the_cap_on_calls_raises_and_counts_every_draw() -> None:
    drawn = 0

    def never_agrees(count: int, generator: torch.Generator) -> Tensor:
        nonlocal drawn
        drawn += count
        return torch.arange(drawn - count, drawn).unsqueeze(-1)

    with pytest.raises(CallLimitError, match="none of 50 draws"):
        sample_exact(never_agrees, 0.5, torch.Generator(), max_calls=50, block=8)
    assert drawn == 50


@pytest.mark.parametrize("temperature", [1.5, 0, -1, math.nan])
def test_temperatures_outside_the_range_are_refused(temperature: float) -> None:
    samples, generator = torch.zeros(4, 3), torch.Generator()
    reason = "only sharpen" if temperature > 1 else "not positive"
    with pytest.raises(UserError, match=reason):
        sample_exact(categorical, temperature, generator, max_calls=10)
    with pytest.raises(UserError, match=reason):
        sample_batch(samples, temperature, generator)


def test_the_batch_approximation_refuses_what_is_not_one_over_n() -> None:
    with pytest.raises(UserError, match="not 1/n"):
        sample_batch(torch.zeros(4, 3), 0.4, torch.Generator())
    assert sample_batch(torch.zeros(4, 3), 0.1, torch.Generator()).agreement == 4


@pytest.mark.parametrize(
    ("chunks", "whole", "agreement", "weights"),
    [
        ([0, 0, 0, 1, 1, 2], 2, 2, {0: 3 / 4, 1: 1 / 4, 2: 0}),  # C(3,2), C(2,2), C(1,2)
        ([0, 0, 0, 1, 1, 2], 3, 3, {0: 1, 1: 0, 2: 0}),
        ([0, 0, 1, 1, 2, 3], 3, 2, {0: 1 / 2, 1: 1 / 2, 2: 0, 3: 0}),  # none seen 3 times: 2
        ([3, 1, 2, 0], 5, 1, {0: 1 / 4, 1: 1 / 4, 2: 1 / 4, 3: 1 / 4}),  # all different: 1
        ([2, 0, 2, 2], 1, 1, {0: 1 / 4, 2: 3 / 4}),  # T = 1: the draws as they are
    ],
)
def test_weights_and_their_fallback(chunks: list[int], whole: int, agreement: int, weights: dict[int, float]) -> None:
    found, reached = chunk_weights(CHUNKS[chunks], whole)
    assert reached == agreement
    by_chunk = {chunk: found[torch.tensor(chunks) == chunk].sum().item() for chunk in set(chunks)}
    assert by_chunk == pytest.approx(weights)


def test_weights_do_not_overflow_for_many_draws() -> None:
    samples = torch.tensor([0] * 30_000 + [1] * 10_000).unsqueeze(-1)
    weights, _ = chunk_weights(samples, 500)
    assert weights[:30_000].sum().item() == pytest.approx(1)
    weights, _ = chunk_weights(samples, 2)
    assert weights[:30_000].sum().item() == pytest.approx(0.9, abs=1e-4)


def test_many_contexts_at_once_equal_one_after_another() -> None:
    samples = categorical(6 * 50, torch.Generator().manual_seed(0)).view(2, 3, 50, 3)
    weights, agreement = chunk_weights(samples, 3)
    together = sample_batch(samples, 1 / 3, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    for row in product(range(2), range(3)):
        counts = Counter(map(tuple, samples[row].tolist()))
        seen = torch.tensor([counts[tuple(chunk)] for chunk in samples[row].tolist()])
        expected = torch.tensor([math.comb(c, 3) / c for c in seen.tolist()], dtype=torch.float64)
        torch.testing.assert_close(weights[row], expected / expected.sum())
        assert agreement[row] == 3
        assert torch.equal(together.tokens[row], sample_batch(samples[row], 1 / 3, generator).tokens)
    assert together.tokens.shape == (2, 3, 3)


def test_batch_samples_follow_their_weights_and_their_seed() -> None:
    contexts = CHUNKS[[0, 1, 1, 2, 2, 2]].expand(5000, 6, 3)  # at T = 1/2: weights 0, 1, 3
    chosen = sample_batch(contexts, 0.5, torch.Generator().manual_seed(0)).tokens
    counts = indices(chosen).bincount(minlength=4)
    assert counts[0] == counts[3] == 0
    assert chi_square_tail(counts[1:3], 5000 * torch.tensor([0.25, 0.75])) > 0.01
    again = sample_batch(contexts, 0.5, torch.Generator().manual_seed(0)).tokens
    assert torch.equal(chosen, again)


def approximated(p: float, count: int, whole: int) -> float:
    """Probability of chunk 0 by the batch approximation for P = (p, 1 - p), over all outcomes of N draws."""
    zeros = torch.arange(count + 1)
    samples = (torch.arange(count) >= zeros.unsqueeze(1)).long().unsqueeze(-1)
    weights, _ = chunk_weights(samples, whole)
    chosen = (weights * (samples[..., 0] == 0)).sum(-1)
    binomial = [math.comb(count, z) * p**z * (1 - p) ** (count - z) for z in range(count + 1)]
    return float(torch.tensor(binomial, dtype=torch.float64) @ chosen)


@pytest.mark.parametrize("whole", [2, 3])
def test_the_bias_of_the_approximation_shrinks_as_draws_grow(whole: int) -> None:
    exact = 0.7**whole / (0.7**whole + 0.3**whole)
    bias = [abs(approximated(0.7, count, whole) - exact) for count in (16, 64, 256)]
    assert approximated(0.7, 16, 1) == pytest.approx(0.7)
    assert all(later < earlier / 3 for earlier, later in pairwise(bias))  # as 1/N
    assert bias[-1] < 0.003


def test_a_certain_sampler_costs_no_more_than_the_draws_that_must_agree() -> None:
    def sampler(count: int, generator: torch.Generator) -> Tensor:
        return torch.full((count, 1), 7)

    assert sample_exact(sampler, 0.3, torch.Generator(), max_calls=4) == (torch.tensor([7]), 4)
