import dataclasses
import itertools
import math
from collections import Counter
from itertools import combinations, pairwise, product
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from calm_core.config.experiment import Experiment, SamplesConfig
from calm_core.config.generation_config import GenerationOptions
from calm_core.config.model_config import BackboneConfig, HeadConfig, ModelShape
from calm_core.config.training_config import ParallelConfig
from calm_core.distributed.topology import Topology
from calm_core.errors import UserError
from calm_core.inference.generate import continue_prompts, forecast, generate, summary
from calm_core.inference.load_model import Loaded
from calm_core.inference.sampler import ChunkSampler, Context
from calm_core.inference.temperature import (
    CallLimitError,
    agreeing_tuples,
    chunk_weights,
    draw_tokens,
    estimate_calls,
    expected_calls,
    sample_batch,
    sample_exact,
    sample_weighted,
    token_weights,
)
from calm_core.model.backbone import transformer_config
from calm_core.model.calm import CalmModel
from calm_core.model.parameters import initialize
from calm_core.tokenizer import Tokenizer

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


FIVE = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2], dtype=torch.float64)


@pytest.fixture(scope="module")
def baseline(topology: Topology, spoken: Tokenizer) -> Loaded:
    """A random autoregressive model."""
    backbone = BackboneConfig(hidden=32, ffn=64, layers=2, heads=4, init_std=0.3)
    shape = ModelShape(backbone, HeadConfig(kind="softmax"), spoken.vocab_size, k=1, latent=0)
    model = CalmModel(transformer_config(shape.backbone, ParallelConfig()), shape).eval()
    initialize([model], 0.3, seed=0)
    return Loaded(model, None, spoken, positions=60)


def by_hand(temperature: float, top_k: int, top_p: float) -> list[float]:
    """The truncated distribution, token by token from the most probable one."""
    powers = {token: p ** (1 / temperature) for token, p in enumerate(FIVE.tolist())}
    ordered = sorted(powers, key=powers.get, reverse=True)[: top_k or None]
    total = sum(powers[token] for token in ordered)
    below = itertools.accumulate((powers[token] / total for token in ordered), initial=0.0)
    kept = [token for token, before in zip(ordered, below, strict=False) if before < top_p]
    total = sum(powers[token] for token in kept)
    return [powers[token] / total if token in kept else 0.0 for token in powers]


CASES = [(1, 0, 1.0), (0.3, 0, 1.0), (1.7, 0, 1.0), (1, 2, 1.0), (1, 0, 0.6), (1, 0, 0.66), (2.0, 4, 0.7), (0.01, 0, 1)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), CASES)
def test_weights_are_those_of_the_truncated_distribution(temperature: float, top_k: int, top_p: float) -> None:
    weights = token_weights(FIVE.log(), temperature, top_k, top_p)
    assert (weights / weights.sum()).tolist() == pytest.approx(by_hand(temperature, top_k, top_p))


def test_equally_probable_tokens_are_truncated_by_their_ids() -> None:
    assert token_weights(torch.zeros(4), 1, top_k=2).tolist() == [1, 1, 0, 0]
    assert token_weights(torch.zeros(4), 1, top_p=0.75).tolist() == [1, 1, 1, 0]


def test_a_token_without_weight_is_never_drawn() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0])
    assert draw_tokens(weights.expand(3, 5), torch.tensor([0.0, 0.2499, 0.25])).tolist() == [1, 1, 3]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), CASES[:-1])
def test_samples_follow_the_truncated_distribution(temperature: float, top_k: int, top_p: float) -> None:
    head = SimpleNamespace(logits=lambda hidden: FIVE.log().expand(1, hidden.shape[1], -1))
    loaded = Loaded(SimpleNamespace(head=head), None, SimpleNamespace(eos=99, pad=98), positions=8)
    sampler = ChunkSampler(loaded, GenerationOptions(temperature=temperature, top_k=top_k, top_p=top_p))
    runs = 4000
    chunks = sampler.next_chunks(torch.zeros(1, runs, 2), [Context(seed, []) for seed in range(runs)], 1)
    found = Counter(chunk.tokens[0] for chunk in chunks)
    wanted = {token: p for token, p in enumerate(by_hand(temperature, top_k, top_p)) if p}
    assert set(found) <= set(wanted)
    statistic = sum((found[token] - runs * p) ** 2 / (runs * p) for token, p in wanted.items())
    assert statistic < chi2.ppf(0.999, len(wanted) - 1)


def test_temperature_one_draws_as_the_head_itself_does(baseline: Loaded) -> None:
    prompts = ["the quick", "", "a lazy"]
    ours, heads = (
        generate(baseline, prompts, GenerationOptions(max_tokens=20, method=method)) for method in ("auto", "batch")
    )
    assert ours == heads
    assert any(len(completion.tokens) == 20 for completion in ours)


def test_every_temperature_is_reached_without_rejection(baseline: Loaded) -> None:
    options = GenerationOptions(max_tokens=20, temperature=0.7, top_p=0.9)
    assert forecast(baseline, ["the"], options) is None
    [completion] = generate(baseline, ["the"], options)
    assert (completion.draws, completion.agreed) == (completion.chunks, 1.0)
    assert "approximate" not in summary(completion, options.for_head(baseline.has_logits))
    cold = dataclasses.replace(options, temperature=1e-3)
    assert generate(baseline, ["the"], cold, seeds=[1])[0].tokens == generate(baseline, ["the"], cold)[0].tokens
    hot = [generate(baseline, ["the"], dataclasses.replace(options, temperature=3), seeds=[s])[0] for s in range(3)]
    assert len({tuple(completion.tokens) for completion in hot}) == 3


def test_the_predicate_holds_for_tokens(baseline: Loaded) -> None:
    def even(chunks: Tensor, history: list[int]) -> Tensor:
        return chunks[:, 0] % 2 == 0

    [completion] = generate(baseline, ["the"], GenerationOptions(max_tokens=20), allowed=even)
    assert completion.tokens
    assert all(token % 2 == 0 for token in completion.tokens)
    with pytest.raises(UserError, match="allows no token"):
        generate(baseline, ["the"], GenerationOptions(max_tokens=5), allowed=lambda chunks, _: chunks[:, 0] < 0)


def test_the_other_methods_agree_with_the_logits(baseline: Loaded) -> None:
    """Rejection knows no probabilities: at T = 1/2 it must give the distribution that the logits give."""
    runs, counts = 1500, {}
    for method in ("logits", "exact"):
        options = GenerationOptions(max_tokens=1, temperature=1 / 2, method=method)
        completions = generate(baseline, ["the quick"] * runs, options)
        counts[method] = Counter(tuple(completion.tokens) for completion in completions)
    tokens = [token for token, count in (counts["logits"] + counts["exact"]).items() if count > 10]
    ours, theirs = ([counts[method][token] for token in tokens] for method in counts)
    statistic = sum((a - b) ** 2 / (a + b) for a, b in zip(ours, theirs, strict=True))
    assert len(tokens) > 2
    assert not math.isnan(statistic)
    assert statistic < chi2.ppf(0.999, len(tokens))


def test_prompts_of_a_configuration_are_continued_with_its_truncation(baseline: Loaded) -> None:
    config = SamplesConfig(prompts=["the"], temperatures=[3.0], max_tokens=20, top_k=1)
    [greedy] = continue_prompts(baseline, config, seed=0)
    assert greedy["tokens"] == continue_prompts(baseline, config, seed=1)[0]["tokens"]
    free = dataclasses.replace(config, top_k=0)
    assert continue_prompts(baseline, free, seed=0)[0]["tokens"] != greedy["tokens"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"temperatures": [1.5]}, "samples: temperature=1.5 is above 1"),
        ({"temperatures": [0.4]}, "not 1/n"),
        ({"top_k": 5}, "samples: top_k=5 needs logits"),
        ({"top_p": 0.5}, "samples: top_p=0.5 needs logits"),
    ],
)
def test_a_configuration_is_refused_where_its_head_has_no_logits(changes: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        Experiment(samples=SamplesConfig(**changes))
    assert Experiment(samples=SamplesConfig(**changes), head=HeadConfig("softmax"))


@pytest.mark.parametrize("changes", [{"temperatures": [0.0]}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_samples_outside_their_bounds_are_refused(changes: dict) -> None:
    with pytest.raises(UserError, match=f"samples.{next(iter(changes))}"):
        SamplesConfig(**changes)
