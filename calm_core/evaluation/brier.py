"""Brier-n and BrierLM: how well a sampler of tokens predicts, from its samples alone (paper, section 4).

Brier-n of a distribution P over the next n tokens and the truth y is `2 P(y) - sum_x P(x)^2`: strictly proper, at most
1, and an expectation over samples, so that no likelihood is needed. BrierLM is 100 times the geometric mean of
Brier-1..4.
"""

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
