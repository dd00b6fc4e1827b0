"""Brier-n and BrierLM: how well a sampler of tokens predicts, from its samples alone (paper, section 4).

Brier-n of a distribution P over the next n tokens and the truth y is `2 P(y) - sum_x P(x)^2`: strictly proper, at most
1, and an expectation over samples, so that no likelihood is needed. BrierLM is 100 times the geometric mean of
Brier-1..4. Below, estimates at each position come first, then their means, whose standard errors count documents, not
positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from calm_core.errors import UserError

MAX_TOKENS = 4  # BrierLM looks at the next 1..4 tokens
CONFIDENCE = 0.95  # that an interval of `interval_factor` standard errors covers the mean
SIGNIFICANT = 2.0  # standard errors above zero, at least, for a score to count as significant
BLOCKS = 32  # that the positions of a single document are divided into, at most

Clusters = Literal["documents", "blocks"]


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


def weighted_brier_terms(samples: Tensor, truth: Tensor, log_weights: Tensor) -> BrierTerms:
    """Terms from weighted samples: a hit weighs as its sample does, a collision as the product of its two samples.

    With equal weights these are the terms of `brier_terms`. They are ratios of estimates, so they are biased while the
    weights leave few effective samples, and consistent as N grows.

    Args:
        samples: `[..., N, tokens]`, as in `brier_terms`.
        truth: `[..., tokens]`.
        log_weights: `[..., N]` float64, up to a constant.
    """
    weights, pairs = log_weights.softmax(-1), _pair_weights(log_weights)
    hits = [(weights * same).sum(-1) for same in _prefixes_agree(samples, truth.unsqueeze(-2))]
    collisions = [(pairs * same).sum((-1, -2)) for same in _pairs_agree(samples)]
    return BrierTerms(torch.stack(hits, -1), torch.stack(collisions, -1))


def weighted_within_variance(samples: Tensor, truth: Tensor, log_weights: Tensor) -> Tensor:
    """The variance of `weighted_brier_terms(...).score` over redrawn samples, per position `[..., n]`.

    The sum of the squared influence of each sample (delta method), times N / (N - 1): about half of the variance where
    only two or three draws are effective, and right as their number grows.
    """
    count = samples.shape[-2]
    weights, pairs = log_weights.softmax(-1), _pair_weights(log_weights)
    variances = []
    for hit, same in zip(_prefixes_agree(samples, truth.unsqueeze(-2)), _pairs_agree(samples), strict=True):
        mean_hit = (weights * hit).sum(-1, keepdim=True)
        collision = (pairs * same).sum((-1, -2), keepdim=True)
        influence = 2 * weights * (hit.double() - mean_hit) - 2 * (pairs * (same.double() - collision)).sum(-1)
        variances.append(influence.square().sum(-1) * count / (count - 1))
    return torch.stack(variances, -1)


def effective_draws(log_weights: Tensor) -> Tensor:
    """How many equally weighted draws the weighted ones `[..., N]` are worth, `[...]`: 1 / sum of squared weights."""
    return 1 / log_weights.softmax(-1).square().sum(-1)


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


def _pair_weights(log_weights: Tensor) -> Tensor:
    """The weights `[..., N, N]` of pairs of two different samples, which sum to 1."""
    logs = log_weights.unsqueeze(-1) + log_weights.unsqueeze(-2)
    same = torch.eye(logs.shape[-1], dtype=torch.bool, device=logs.device)
    return logs.masked_fill(same, -torch.inf).flatten(-2).softmax(-1).view_as(logs)


def interval_factor(clusters: int) -> float:
    """Half the width of a 95 % interval, in standard errors from this number of clusters.

    The quantile of Student's t with C - 1 degrees of freedom: 4.30 for 3 clusters, 2.26 for 10, 1.96 for many.
    """
    from scipy.special import stdtrit

    return float(stdtrit(clusters - 1, (1 + CONFIDENCE) / 2))


def half_interval(record: Mapping[str, Any], key: str) -> float | None:
    """Half the width of the 95 % interval of a score; None where its standard error is not known.

    An evaluation, or the row that a study has of it, says how many standard errors that is, more with few documents;
    one that does not say it gets two.
    """
    error = record.get(f"{key}_error")
    factor = record.get("interval_factor") or (record.get("standard_errors") or {}).get("interval_factor")
    return None if error is None else (factor or 2.0) * error


@dataclass(frozen=True)
class ClusteredMean:
    """Means over positions with their uncertainty when the positions of a cluster are not independent.

    Attributes:
        mean: `[n]` float64; NaN without positions.
        covariance: `[n, n]` of the means; NaN with fewer than two clusters.
        positions: number of positions.
        clusters: number of clusters, C.
        unit: what they are: documents, or blocks of positions where there is a single document.
    """

    mean: Tensor
    covariance: Tensor
    positions: int
    clusters: int
    unit: Clusters = "documents"

    @property
    def standard_error(self) -> Tensor:
        """`[n]`; NaN with fewer than two clusters."""
        return self.covariance.diagonal().sqrt()

    @property
    def documents(self) -> int:
        """Number of documents."""
        return self.clusters if self.unit == "documents" else 1


class BrierAccumulator:
    """Means of per-position values, clustered by document; batches and ranks merge to the same result.

    It holds one row per document and block of positions: for each column the number of its positions and the sum of
    their values.
    """

    def __init__(self, columns: int) -> None:
        """For values with `columns` columns."""
        self._keys = torch.empty(0, 2, dtype=torch.int64)
        self._counts = torch.empty(0, columns, dtype=torch.int64)
        self._sums = torch.empty(0, columns, dtype=torch.float64)

    def add(
        self, values: Tensor, documents: Tensor, counted: Tensor | None = None, blocks: Tensor | None = None
    ) -> None:
        """Add positions.

        Args:
            values: `[P, n]`.
            documents: the document of each position, `[P]` int64.
            counted: which values count, `[P, n]` bool; None: all.
            blocks: a number for each short run of neighbouring positions, ascending in the text, `[P]` int64; used
                where all positions turn out to be of one document. None: there is one block.
        """
        values, documents = values.detach().cpu().double(), documents.cpu()
        blocks = torch.zeros_like(documents) if blocks is None else blocks.cpu()
        counted = torch.ones_like(values, dtype=torch.bool) if counted is None else counted.cpu()
        self.merge((torch.stack([documents, blocks], 1), counted.long(), values.where(counted, 0)))

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """Document and block `[R, 2]` int64, positions `[R, n]` int64, sums `[R, n]` float64: what ranks exchange."""
        return self._keys, self._counts, self._sums

    def merge(self, state: tuple[Tensor, Tensor, Tensor]) -> None:
        """Add the state of another accumulator; a document may appear in both."""
        keys, counts, sums = (torch.cat(pair) for pair in zip(self.state(), state, strict=True))
        self._keys, row = keys.unique(dim=0, return_inverse=True)
        self._counts, self._sums = _summed(counts, row, len(self._keys)), _summed(sums, row, len(self._keys))

    def result(self) -> ClusteredMean:
        """Means with their cluster-robust covariance.

        The clusters are the documents; where there is only one, up to `BLOCKS` blocks of consecutive positions. The
        residual of a cluster with the fraction a of the positions is divided by sqrt(1 - 2 a + sum of all a^2), which
        makes the variance unbiased if clusters vary equally: for equal sizes that is the factor C / (C - 1).
        """
        filled = (self._counts > 0).any(1)
        documents, cluster = self._keys[filled, 0].unique(return_inverse=True)
        unit: Clusters = "documents"
        blocks = int(filled.sum())
        if len(documents) == 1 and blocks > 1:  # rows are sorted by block
            unit, cluster = "blocks", torch.arange(blocks) * min(blocks, BLOCKS) // blocks
        clusters = int(cluster.max()) + 1 if len(cluster) else 0
        counts, sums = (_summed(rows[filled], cluster, clusters) for rows in (self._counts, self._sums))
        total = counts.sum(0)
        mean = sums.sum(0) / total
        fraction = counts / total
        free = 1 - 2 * fraction + fraction.square().sum(0)
        # A cluster that has all positions leaves no residual, which says nothing about how clusters differ.
        residual = ((sums - counts * mean) / total / free.sqrt()).where(free > 1e-12, torch.nan)
        return ClusteredMean(mean, residual.mT @ residual, int(total.max()), clusters, unit)


def clustered_mean(values: Tensor, documents: Tensor) -> ClusteredMean:
    """Means of `values` `[P, n]` over positions, with standard errors clustered by `documents` `[P]` int64."""
    accumulator = BrierAccumulator(values.shape[1])
    accumulator.add(values, documents)
    return accumulator.result()


class BrierLM(NamedTuple):
    """BrierLM and its standard error, or None and the reason why it is not reported."""

    value: float | None
    standard_error: float | None
    reason: str | None


def brier_lm(brier: ClusteredMean) -> BrierLM:
    """100 * (Brier-1 * Brier-2 * Brier-3 * Brier-4)^(1/4), from the four means (paper, section 4).

    Reported only when each of the four exceeds two standard errors, and more with few clusters (`interval_factor`): the
    product of four negative scores is positive, so without this a predictor that is always wrong scores 100. The
    standard error is by the delta method.
    """
    if len(brier.mean) != MAX_TOKENS:
        return BrierLM(None, None, f"BrierLM needs Brier-1 to Brier-4; only {len(brier.mean)} of them were estimated.")
    if brier.clusters < 2:
        return BrierLM(None, None, "Standard errors need at least two documents, or two blocks of positions in one.")
    error, factor = brier.standard_error, max(SIGNIFICANT, interval_factor(brier.clusters))
    doubtful = [f"Brier-{n + 1}" for n in range(MAX_TOKENS) if not brier.mean[n] > factor * error[n]]
    if doubtful:
        return BrierLM(None, None, f"Not above zero by {factor:.3g} standard errors: {', '.join(doubtful)}.")
    value = 100 * brier.mean.log().mean().exp()
    slope = value / (MAX_TOKENS * brier.mean)
    return BrierLM(value.item(), (slope @ brier.covariance @ slope).sqrt().item(), None)


def _summed(rows: Tensor, group: Tensor, groups: int) -> Tensor:
    """The rows `[R, n]` summed by group, `[groups, n]`."""
    return rows.new_zeros(groups, rows.shape[1]).index_add_(0, group, rows)
