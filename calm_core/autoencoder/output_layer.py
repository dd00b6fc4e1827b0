"""The output layer: cross-entropy, whole or sampled, and most probable tokens, without all logits in memory at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from calm_core.config.model_config import padded_vocabulary
from calm_core.model.linear_cross_entropy import linear_cross_entropy

ROWS_AT_ONCE = 256  # inputs whose logits are held at a time: 32 MB at V = 32,000 in float32

LOGITS_AT_ONCE = 1 << 21  # logits searched at a time for the largest: 8 MB, which stay in the processor's cache


def log_probability(features: Tensor, weight: Tensor, token: int | Tensor) -> Tensor:
    """The log-probability `[n]` float64 of `token` for inputs `[n, hidden]`; logits are `features @ weight.T`.

    `token` is one for all inputs, or `[n]`.
    """
    tokens = torch.as_tensor(token, device=features.device).expand(len(features))
    rows = zip(features.split(ROWS_AT_ONCE), tokens.split(ROWS_AT_ONCE), strict=True)
    found = [(part @ weight.T).double().log_softmax(-1).gather(1, own.unsqueeze(1)) for part, own in rows]
    return torch.cat(found).squeeze(1)


def most_probable(features: Tensor, weight: Tensor) -> Tensor:
    """The most probable token `[n]` for each input `[n, hidden]`, the first of several; logits as above."""
    return torch.cat([_most_probable(part, weight) for part in features.split(ROWS_AT_ONCE)])


def _most_probable(features: Tensor, weight: Tensor) -> Tensor:
    """By parts of the vocabulary, so that logits are searched while they are in the cache."""
    size = max(1, LOGITS_AT_ONCE // len(features))
    logits, tokens = [], []
    for start in range(0, len(weight), size):
        of_part = features @ weight[start : start + size].T
        best = argmax(of_part).unsqueeze(1)
        logits.append(of_part.gather(1, best))
        tokens.append(best + start)
    winner = torch.cat(logits, 1).argmax(1, keepdim=True)
    return torch.cat(tokens, 1).gather(1, winner).squeeze(1)


def argmax(logits: Tensor, block: int = 128) -> Tensor:
    """The first index of the largest value in each row of `[n, V]`, `[n]`.

    On a CPU torch's maximum is vectorised and its argmax is not. So the best block is found by maxima, and only that
    block is searched: a tenth of the time at V = 4,096.
    """
    whole = logits.shape[1] // block * block
    best = logits[:, :whole].unflatten(1, (-1, block)).amax(-1)
    if whole < logits.shape[1]:
        best = torch.cat([best, logits[:, whole:].amax(-1, keepdim=True)], 1)
    start = best.argmax(-1, keepdim=True) * block
    inside = (start + torch.arange(block, device=logits.device)).clamp(max=logits.shape[1] - 1)
    return (start + logits.gather(1, inside).argmax(-1, keepdim=True)).squeeze(1)


def sampled_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, keys: Tensor, count: int) -> Tensor:
    """An estimate of the mean cross-entropy of B samples, for which the logits of `count` tokens each are computed.

    These are all tokens that occur in the sample and, of the others, those with the lowest keys. The drawn ones stand
    for all m that do not occur: each of r counts m / r times in the softmax's denominator, whose estimate is unbiased
    (stratified sampling). With `count` = V the cross-entropy is exact.

    Args:
        hidden: `[B, n, d]`.
        weight: `[V, d]`.
        targets: `[B, n]`, of which a sample has at most `count` different ones.
        keys: `[B, V]`, independent draws from U[0, 1).
        count: tokens that the softmax of a sample runs over.
    """
    own = torch.zeros_like(keys, dtype=torch.bool).scatter_(1, targets, True)
    tokens = keys.masked_fill(own, -1.0).topk(count, largest=False, sorted=False).indices  # [B, count]
    drawn = ~own.gather(1, tokens)
    stands_for = (~own).sum(1, keepdim=True) / drawn.sum(1, keepdim=True)
    offsets = torch.where(drawn, stands_for.log(), 0.0)
    place = torch.arange(count, device=tokens.device).expand_as(tokens)
    goals = torch.zeros_like(own, dtype=torch.int64).scatter_(1, tokens, place).gather(1, targets)
    losses = map(mean_cross_entropy, hidden, F.embedding(tokens, weight), goals, offsets)
    return torch.stack(list(losses)).mean()


def mean_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, offsets: Tensor | None = None, rows: int | None = None
) -> Tensor:
    """Mean cross-entropy in nats of `targets [n]` under the logits `hidden [n, d] @ weight [V, d].T + offsets [V]`.

    The products run on a vocabulary padded to `padded_vocabulary`, whose padding has probability 0: with an odd V, such
    as 128,257, the rows of logits are not aligned, for which GPUs have slower kernels.
    """
    vocabulary = len(weight)
    if padding := padded_vocabulary(vocabulary) - vocabulary:
        weight = F.pad(weight, (0, 0, 0, padding))
        offsets = None if offsets is None else F.pad(offsets, (0, padding))
    return linear_cross_entropy(hidden, weight, targets, offsets=offsets, vocabulary=vocabulary, rows=rows).mean()
