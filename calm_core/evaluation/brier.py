"""Brier-n and BrierLM: how well a sampler of tokens predicts, from its samples alone (paper, section 4).

Brier-n of a distribution P over the next n tokens and the truth y is `2 P(y) - sum_x P(x)^2`: strictly proper, at most
1, and an expectation over samples, so that no likelihood is needed. BrierLM is 100 times the geometric mean of
Brier-1..4.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from calm_core.errors import UserError

MAX_TOKENS = 4  # BrierLM looks at the next 1..4 tokens


@dataclass(frozen=True)
class BrierTerms:
    """The two halves of Brier-n at each position, `[..., n]` float64, for the next 1..n tokens.

    Attributes:
        hit: estimate of P(y), the probability of the truth.
        collision: estimate of sum_x P(x)^2, the probability that two samples agree.
    """

    hit: Tensor
    collision: Tensor

    @property
    def score(self) -> Tensor:
        """Brier-n per position, `[..., n]`."""
        return 2 * self.hit - self.collision


def brier_terms(samples: Tensor, truth: Tensor) -> BrierTerms:
    """Unbiased estimates from N samples: all of them for the hits, all N (N - 1) / 2 pairs for the collisions.

    Where the truth is distributed as the samples are, the variance of the score given the position is, averaged over
    the truth, 2 (2 N - 1) / (3 N (N - 1)) of the two-sample estimator's, whatever the distribution: 0.179 at N = 8,
    0.042 at N = 32. A truth much likelier than a collision takes it up to 2 / N, 0.25 and 0.0625; an unlikely one down.

    Args:
        samples: `[..., N, tokens]` integers, N >= 2; for chunks of fewer than 4 tokens, roll-outs of several chunks.
        truth: `[..., tokens]`.

    Returns:
        Terms `[..., n]` with n = min(tokens, 4). Memory is that of N x N flags per position.
    """
    count = samples.shape[-2]
    if count < 2:
        raise UserError(f"Brier scores need at least 2 samples a position, not {count}: raise the number of samples.")
    hits = [same.mean(-1, dtype=torch.float64) for same in _prefixes_agree(samples, truth.unsqueeze(-2))]
    pairs = count * (count - 1)
    collisions = [_off_diagonal(same).sum((-1, -2)).double() / pairs for same in _pairs_agree(samples)]
    return BrierTerms(torch.stack(hits, -1), torch.stack(collisions, -1))


def autoregressive_brier_terms(truth_logprob: Tensor, rollout_logprob: Tensor) -> BrierTerms:
    """Terms of a model with likelihoods, at far less noise than from samples.

    Args:
        truth_logprob: `[..., n]`, log-probability of each true token given all before it (teacher forcing).
        rollout_logprob: `[..., N, n]`, log-probability of each token of N roll-outs given all before it: since a
            roll-out x is drawn from P, E[P(x)] is the probability of a collision.
    """
    hit, probability = (logprob.double().cumsum(-1).exp() for logprob in (truth_logprob, rollout_logprob))
    return BrierTerms(hit, probability.mean(-2))


def autoregressive_within_variance(rollout_logprob: Tensor) -> Tensor:
    """Unbiased estimate of the variance of `autoregressive_brier_terms(...).score` over redrawn roll-outs, `[..., n]`.

    The truth term is exact, so it is that of a mean of N independent collision terms; `rollout_logprob` as there.
    """
    return rollout_logprob.double().cumsum(-1).exp().var(-2) / rollout_logprob.shape[-2]


def within_variance(samples: Tensor, truth: Tensor) -> Tensor:
    """Unbiased estimate of the variance of `brier_terms(...).score` over redrawn samples, per position `[..., n]`.

    The score U averages h(x_i, x_j) over pairs. U^2 less the average of h(x_i, x_j) h(x_k, x_l) over four different
    samples is unbiased for Var U, so it needs N >= 4; at a single position it may be negative.
    """
    count = samples.shape[-2]
    if count < 4:
        raise UserError(f"The variance within a position needs at least 4 samples, not {count}.")
    variances = []
    for hit, same in zip(_prefixes_agree(samples, truth.unsqueeze(-2)), _pairs_agree(samples), strict=True):
        hit = hit.double()
        kernel = _off_diagonal(hit.unsqueeze(-1) + hit.unsqueeze(-2) - same.double())
        total = kernel.sum((-1, -2))
        disjoint = total.square() - 4 * kernel.sum(-1).square().sum(-1) + 2 * kernel.square().sum((-1, -2))
        pairs = count * (count - 1)
        variances.append((total / pairs).square() - disjoint / (pairs * (count - 2) * (count - 3)))
    return torch.stack(variances, -1)


class VarianceParts(NamedTuple):
    """The variance of the score of one position, `[n]` each: from the draw of its samples, and from the position."""

    within: Tensor
    between: Tensor


def variance_parts(score: Tensor, within: Tensor) -> VarianceParts:
    """Splits the variance of scores `[P, n]` over positions by the estimates `within_variance` `[P, n]` of one part.

    More samples a position shrink `within` alone; only more positions average `between` out. Unbiased for
    independent positions; a small `between` may come out negative.
    """
    mean_within = within.mean(0)
    return VarianceParts(mean_within, score.var(0) - mean_within)


@dataclass(frozen=True)
class ClusteredMean:
    """Means over positions with their uncertainty when the positions of a document are not independent.

    Attributes:
        mean: `[n]` float64; NaN without positions.
        covariance: `[n, n]` of the means; NaN with fewer than two documents.
        positions: number of positions.
        clusters: number of documents, C.
    """

    mean: Tensor
    covariance: Tensor
    positions: int
    clusters: int

    @property
    def standard_error(self) -> Tensor:
        """`[n]`; NaN with fewer than two documents."""
        return self.covariance.diagonal().sqrt()


class BrierAccumulator:
    """Means of per-position values, clustered by document; batches and ranks merge to the same result.

    It holds one row per document: for each column the number of its positions and the sum of their values.
    """

    def __init__(self, columns: int) -> None:
        """For values with `columns` columns."""
        self._clusters = torch.empty(0, dtype=torch.int64)
        self._counts = torch.empty(0, columns, dtype=torch.int64)
        self._sums = torch.empty(0, columns, dtype=torch.float64)

    def add(self, values: Tensor, clusters: Tensor, counted: Tensor | None = None) -> None:
        """Adds positions: `values` `[P, n]`, the document of each, `clusters` `[P]` int64, and which values count."""
        values, clusters = values.detach().cpu().double(), clusters.cpu()
        counted = torch.ones_like(values, dtype=torch.bool) if counted is None else counted.cpu()
        self.merge((clusters, counted.long(), values.where(counted, 0)))

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """Documents `[C]` int64, their positions `[C, n]` int64, their sums `[C, n]` float64: what ranks exchange."""
        return self._clusters, self._counts, self._sums

    def merge(self, state: tuple[Tensor, Tensor, Tensor]) -> None:
        """Adds the state of another accumulator; a document may appear in both."""
        clusters, counts, sums = (torch.cat(pair) for pair in zip(self.state(), state, strict=True))
        self._clusters, row = clusters.unique(return_inverse=True)
        self._counts = counts.new_zeros(len(self._clusters), counts.shape[1]).index_add_(0, row, counts)
        self._sums = sums.new_zeros(len(self._clusters), sums.shape[1]).index_add_(0, row, sums)

    def result(self) -> ClusteredMean:
        """Means with the cluster-robust covariance, scaled by C / (C - 1) for few documents."""
        count, clusters = self._counts.sum(0), len(self._clusters)
        mean = self._sums.sum(0) / count
        residual = (self._sums - self._counts * mean) / count
        # One document leaves no residual, which says nothing about how documents differ.
        scale = clusters / (clusters - 1) if clusters > 1 else math.nan
        return ClusteredMean(mean, residual.mT @ residual * scale, int(count.max()), clusters)


def clustered_mean(values: Tensor, clusters: Tensor) -> ClusteredMean:
    """Means of `values` `[P, n]` over positions, with standard errors clustered by `clusters` `[P]` int64."""
    accumulator = BrierAccumulator(values.shape[1])
    accumulator.add(values, clusters)
    return accumulator.result()


class BrierLM(NamedTuple):
    """BrierLM and its standard error, or None and the reason why it is not reported."""

    value: float | None
    standard_error: float | None
    reason: str | None


def brier_lm(brier: ClusteredMean) -> BrierLM:
    """100 * (Brier-1 * Brier-2 * Brier-3 * Brier-4)^(1/4), from the four means (paper, section 4).

    Reported only when each of the four exceeds two standard errors: the product of four negative scores is positive, so
    without this a predictor that is always wrong scores 100. The standard error is by the delta method.
    """
    if len(brier.mean) != MAX_TOKENS:
        return BrierLM(None, None, f"BrierLM needs Brier-1 to Brier-4; only {len(brier.mean)} of them were estimated.")
    if brier.clusters < 2:
        return BrierLM(None, None, f"Standard errors need at least two documents, not {brier.clusters}.")
    error = brier.standard_error
    doubtful = [f"Brier-{n + 1}" for n in range(MAX_TOKENS) if not brier.mean[n] > 2 * error[n]]
    if doubtful:
        return BrierLM(None, None, f"Not above zero by two standard errors: {', '.join(doubtful)}.")
    value = 100 * brier.mean.log().mean().exp()
    slope = value / (MAX_TOKENS * brier.mean)
    return BrierLM(value.item(), (slope @ brier.covariance @ slope).sqrt().item(), None)


def _prefixes_agree(left: Tensor, right: Tensor) -> list[Tensor]:
    """Flags `[...]` for n = 1..min(tokens, 4): the first n tokens of left and right `[..., tokens]` are equal."""
    agree = [left[..., 0] == right[..., 0]]
    for token in range(1, min(left.shape[-1], MAX_TOKENS)):
        agree.append(agree[-1] & (left[..., token] == right[..., token]))
    return agree


def _pairs_agree(samples: Tensor) -> list[Tensor]:
    """Flags `[..., N, N]` for each n: the first n tokens of two samples are equal."""
    return _prefixes_agree(samples.unsqueeze(-2), samples.unsqueeze(-3))


def _off_diagonal(pairs: Tensor) -> Tensor:
    """`[..., N, N]` with zeros for a sample against itself."""
    return pairs * ~torch.eye(pairs.shape[-1], dtype=torch.bool, device=pairs.device)
