from itertools import pairwise, product

import torch
from torch import Tensor

from calm_core.evaluation.brier import brier_terms
from calm_core.evaluation.ngram import BigramModel, bigram_brier_terms, unigram_brier_terms

# Token 3 occurs once, as the last: nothing is known to follow it. Token 4 never occurs.
TOKENS = torch.tensor([0, 1, 0, 2, 0, 1, 1, 2, 0, 0, 1, 2, 3])
VOCABULARY = 5


def transition() -> Tensor:
    """P(next | previous) `[V, V]` as a full table, counted one pair at a time."""
    table = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
    for previous, token in pairwise(TOKENS):
        table[previous, token] += 1
    unigram = TOKENS.bincount(minlength=VOCABULARY) / len(TOKENS)
    return torch.stack([row / row.sum() if row.sum() else unigram.double() for row in table])


def test_bigram_probabilities_are_the_frequencies_with_the_unigram_where_nothing_follows() -> None:
    everything = torch.arange(VOCABULARY)
    table = BigramModel(TOKENS, VOCABULARY).probability(everything.unsqueeze(1), everything)
    torch.testing.assert_close(table, transition())


def test_bigram_terms_equal_a_sum_over_every_continuation() -> None:
    table = transition()
    truth = torch.tensor([[0, 1, 2, 0], [1, 1, 2, 3], [2, 3, 0, 1], [4, 0, 0, 0]])
    previous = torch.tensor([2, 0, 3, 4])
    terms = bigram_brier_terms(BigramModel(TOKENS, VOCABULARY), previous, truth)
    for position, n in product(range(4), range(1, 5)):
        chains = torch.tensor(list(product(range(VOCABULARY), repeat=n)))
        context = torch.cat([previous[position].expand(len(chains), 1), chains[:, :-1]], dim=-1)
        probability = table[context, chains].prod(-1)
        hit = probability[(chains == truth[position, :n]).all(-1)].item()
        torch.testing.assert_close(terms.hit[position, n - 1].item(), hit)
        torch.testing.assert_close(terms.collision[position, n - 1].item(), probability.square().sum().item())


def test_sampled_chains_follow_the_table_at_their_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    for temperature in (1.0, 0.5):
        chains = BigramModel(TOKENS, VOCABULARY).sample(torch.full((4000,), 3), 6, temperature, generator)
        steps = torch.cat([torch.full((4000, 1), 3), chains], dim=1)
        pairs = torch.stack([steps[:, :-1].flatten(), steps[:, 1:].flatten()])
        counts = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
        counts.index_put_((pairs[0], pairs[1]), torch.ones(pairs.shape[1], dtype=torch.float64), accumulate=True)
        sharpened = transition().pow(1 / temperature)
        expected = sharpened / sharpened.sum(1, keepdim=True)
        found = counts[:4] / counts[:4].sum(1, keepdim=True)  # no token 4 is ever drawn
        torch.testing.assert_close(found, expected[:4], atol=0.03, rtol=0)


def test_unigram_terms_are_the_expectation_of_sampling_tokens_independently() -> None:
    counts = torch.tensor([5, 3, 2])
    generator = torch.Generator().manual_seed(0)
    samples = torch.multinomial(counts / 10, 20_000 * 16, replacement=True, generator=generator).view(20_000, 8, 2)
    truth = torch.tensor([0, 1])
    exact = unigram_brier_terms(counts, truth)
    torch.testing.assert_close(exact.hit, torch.tensor([0.5, 0.15]).double())
    torch.testing.assert_close(exact.collision, torch.tensor([0.38, 0.38**2]).double())
    estimate = brier_terms(samples, truth.expand(20_000, 2)).score.mean(0)
    torch.testing.assert_close(estimate, exact.score, atol=0.006, rtol=0)


def test_unigram_terms_of_many_positions() -> None:
    truth = torch.tensor([[0, 1, 2, 0, 2], [2, 2, 2, 2, 1]])
    terms = unigram_brier_terms(torch.tensor([2, 1, 1]), truth)
    torch.testing.assert_close(terms.hit[1], torch.tensor([0.25**n for n in range(1, 5)]).double())
    torch.testing.assert_close(terms.collision[0], torch.tensor([0.375**n for n in range(1, 5)]).double())
