"""The n-gram baselines that a trained model has to beat: their exact Brier-n, and text of the bigram model."""

import numpy as np
import torch
from torch import Tensor

from calm_core.data.store import Store
from calm_core.evaluation.brier import MAX_TOKENS, BrierTerms

BIGRAM_TOKENS = 1 << 24  # of a training split that the bigram baseline is counted on: all of a small corpus


def unigram_brier_terms(counts: Tensor, truth: Tensor) -> BrierTerms:
    """Exact terms of independent tokens with the frequencies of a corpus: prod_i p(y_i), and (sum p^2)^n.

    Args:
        counts: occurrences of each token, `[V]`.
        truth: `[..., tokens]` int64.

    Returns:
        Terms `[..., n]`, n = min(tokens, 4).
    """
    probability = counts.double() / counts.sum()
    truth = truth[..., :MAX_TOKENS]
    hit = probability[truth].cumprod(-1)
    collision = probability.square().sum().expand(truth.shape[-1]).cumprod(-1)
    return BrierTerms(hit, collision.expand_as(hit))


class BigramModel:
    """P(next | previous) by the frequencies of adjacent pairs; the unigram model after a token that had no successor.

    Memory grows with the distinct pairs, not with V.
    """

    def __init__(self, tokens: Tensor, vocabulary: int) -> None:
        """Counts the adjacent pairs of `tokens` `[T]` int64 in [0, vocabulary)."""
        tokens = tokens.long()
        self.vocabulary = vocabulary
        self.unigram = tokens.bincount(minlength=vocabulary).double() / len(tokens)
        self.pairs, counts = (tokens[:-1] * vocabulary + tokens[1:]).unique(return_counts=True)  # sorted
        self.previous, self.following = self.pairs // vocabulary, self.pairs % vocabulary
        successors = counts.new_zeros(vocabulary).index_add_(0, self.previous, counts)
        self.probabilities = counts.double() / successors[self.previous]
        self.seen = successors > 0

    def probability(self, previous: Tensor, token: Tensor) -> Tensor:
        """P(token | previous), elementwise, float64."""
        pair = previous * self.vocabulary + token
        row = torch.searchsorted(self.pairs, pair).clamp_(max=len(self.pairs) - 1)
        conditional = torch.where(self.pairs[row] == pair, self.probabilities[row], 0.0)
        return torch.where(self.seen[previous], conditional, self.unigram[token])

    def collision(self, tokens: int) -> Tensor:
        """Probability that two continuations of n = 1..tokens tokens agree, by the token before them, `[tokens, V]`.

        Two chains that agree so far share their state, so c_n(i) = sum_j P(j | i)^2 c_{n-1}(j): one pass over the
        pairs for each n.
        """
        squares = self.probabilities.square()
        rows = [torch.ones(self.vocabulary, dtype=torch.float64)]
        for _ in range(tokens):
            terms = squares * rows[-1][self.following]
            row = torch.zeros_like(rows[-1]).index_add_(0, self.previous, terms)
            rows.append(torch.where(self.seen, row, self.unigram.square() @ rows[-1]))
        return torch.stack(rows[1:])

    def sample(self, first: Tensor, count: int, temperature: float, generator: torch.Generator) -> Tensor:
        """Chains of `count` tokens that follow the tokens `first` `[R]`, `[R, count]` int64.

        At a temperature T each token is drawn from P(next | previous)^(1/T) / Z.
        """
        drawn, chances = [first.long()], self.probabilities.pow(1 / temperature)
        # Pairs are sorted by the token before, so that the successors of a token are a stretch of one running sum.
        sums = torch.cat([chances.new_zeros(1), chances.cumsum(0)])
        begin = torch.searchsorted(self.previous, torch.arange(self.vocabulary))
        end = torch.searchsorted(self.previous, torch.arange(self.vocabulary), right=True)
        unigram = self.unigram.pow(1 / temperature)
        for _ in range(count):
            low, high = begin[drawn[-1]], end[drawn[-1]]
            at = torch.rand(len(first), dtype=torch.float64, generator=generator)
            pair = torch.searchsorted(sums, sums[low].lerp(sums[high], at), right=True) - 1
            following = self.following[torch.minimum(pair, (high - 1).clamp_(min=0))]
            fallback = torch.multinomial(unigram, len(first), replacement=True, generator=generator)
            drawn.append(torch.where(low < high, following, fallback))
        return torch.stack(drawn[1:], 1)


def bigram_of(store: Store) -> BigramModel:
    """The bigram model of the first `BIGRAM_TOKENS` tokens of a store."""
    tokens = store.read(0, min(len(store), BIGRAM_TOKENS // store.k), ("tokens",))["tokens"]
    return BigramModel(torch.from_numpy(tokens.reshape(-1).astype(np.int64)), store.vocab_size)


def bigram_brier_terms(model: BigramModel, previous: Tensor, truth: Tensor) -> BrierTerms:
    """Exact terms of the bigram model for the true next tokens `[..., tokens]` after the token `previous` `[...]`."""
    truth = truth[..., :MAX_TOKENS].long()
    context = torch.cat([previous.long().unsqueeze(-1), truth[..., :-1]], dim=-1)
    hit = model.probability(context, truth).cumprod(-1)
    return BrierTerms(hit, model.collision(truth.shape[-1]).T[previous.long()])
