"""The decoder's output layer, for more inputs than their logits have room for."""

import torch
from torch import Tensor

ROWS_AT_ONCE = 256  # inputs whose logits are held at a time: 32 MB at V = 32,000 in float32
LOGITS_AT_ONCE = 1 << 21  # of a search for the largest: 8 MB, which stay in the processor's cache


def log_probability(features: Tensor, weight: Tensor, token: int) -> Tensor:
    """The log-probability `[n]` float64 of `token` for inputs `[n, hidden]`; logits are `features @ weight.T`."""
    parts = [(part @ weight.T).double().log_softmax(-1)[:, token] for part in features.split(ROWS_AT_ONCE)]
    return torch.cat(parts)


def most_probable(features: Tensor, weight: Tensor) -> Tensor:
    """The most probable token `[n]` for each input `[n, hidden]`, the first of several; logits as above."""
    return torch.cat([_most_probable(part, weight) for part in features.split(ROWS_AT_ONCE)])


def _most_probable(features: Tensor, weight: Tensor) -> Tensor:
    """Part of the vocabulary after part, so that no logit leaves the cache before it has been looked at."""
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
    """The first place of the largest of `[n, V]` in each row, `[n]`.

    On a CPU torch's argmax goes value by value, its maximum does not: so the best block is found by maxima, and only
    that is searched, a tenth of the time at V = 4,096.
    """
    whole = logits.shape[1] // block * block
    best = logits[:, :whole].unflatten(1, (-1, block)).amax(-1)
    if whole < logits.shape[1]:
        best = torch.cat([best, logits[:, whole:].amax(-1, keepdim=True)], 1)
    start = best.argmax(-1, keepdim=True) * block
    inside = (start + torch.arange(block, device=logits.device)).clamp(max=logits.shape[1] - 1)
    return (start + logits.gather(1, inside).argmax(-1, keepdim=True)).squeeze(1)
