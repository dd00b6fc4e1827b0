"""The output layer: cross-entropy, whole or sampled, and most probable tokens, without all logits in memory at once."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from calm_core.config.model_config import padded_vocabulary

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
    losses = map(linear_cross_entropy, hidden, F.embedding(tokens, weight), goals, offsets)
    return torch.stack(list(losses)).mean()


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, offsets: Tensor | None = None, rows: int = 1024
) -> Tensor:
    """Mean cross-entropy in nats of `targets [n]` under the logits `hidden [n, d] @ weight [V, d].T + offsets [V]`.

    Matrix products run in the inputs' dtype, softmax and sums in float32 (float64 for float64). The gradients are
    computed with the loss, `rows` tokens at a time: only their logits are held, not several copies of all n x V.

    The products run on a vocabulary padded to `padded_vocabulary`, whose padding has probability 0: with an odd V, such
    as 128,257, the rows of logits are not aligned, for which GPUs have slower kernels.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _WithGradients.apply(hidden, weight, targets, offsets, rows)
    losses = [
        F.cross_entropy(_logits(part, weight, offsets), goal, reduction="sum")
        for part, goal in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.stack(losses).sum() / len(targets)


class _WithGradients(torch.autograd.Function):
    """Computes both gradients in the forward pass, slice by slice of the logits, and keeps only the gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, offsets: Tensor | None, rows: int) -> Tensor:
        precision = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=precision, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)
        vocabulary = len(weight)
        if padding := padded_vocabulary(vocabulary) - vocabulary:
            weight = F.pad(weight, (0, 0, 0, padding))
            offsets = None if offsets is None else F.pad(offsets, (0, padding))
        weight_gradient = torch.zeros_like(weight, dtype=precision)
        for start in range(0, len(targets), rows):
            part, goal = hidden[start : start + rows], targets[start : start + rows, None]
            logits = _logits(part, weight, offsets)
            logits[:, vocabulary:] = -torch.inf
            probabilities = logits.log_softmax(-1)
            total -= probabilities.gather(1, goal).sum()
            probabilities.exp_().scatter_add_(1, goal, -torch.ones_like(goal, dtype=precision))
            slope = probabilities.to(hidden.dtype)  # gradient of the summed loss with respect to the logits
            torch.mm(slope, weight, out=hidden_gradient[start : start + rows])
            weight_gradient += slope.T @ part
        ctx.save_for_backward(hidden_gradient, weight_gradient[:vocabulary])
        ctx.count, ctx.dtype = len(targets), weight.dtype
        return total / len(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_loss / ctx.count
        hidden_gradient, weight_gradient = ctx.saved_tensors
        of_hidden = (hidden_gradient * scale).to(hidden_gradient.dtype)
        return of_hidden, (weight_gradient * scale).to(ctx.dtype), None, None, None


def _logits(hidden: Tensor, weight: Tensor, offsets: Tensor | None) -> Tensor:
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if offsets is None else logits.add_(offsets)
