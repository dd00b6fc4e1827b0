"""The decoder's output layer: the most probable tokens of many inputs, with no more of the logits than that takes."""

import torch
from torch import Tensor

ROWS_AT_ONCE = 256  # rows of logits held: 32 MB at V = 32,000 in float32
FEW = 32  # inputs whose logits cost about as much as to search for what inputs have in common


class OutputLayer:
    """Logits `features [n, hidden] @ weight [V, hidden].T`."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._squares = weight.float().square().sum(-1)

    def log_probability(self, features: Tensor, token: int) -> Tensor:
        """The log-probability `[n]` float64 of `token` for each input `[n, hidden]`."""
        parts = [(p @ self.weight.T).double().log_softmax(-1)[:, token] for p in features.split(ROWS_AT_ONCE)]
        return torch.cat(parts)

    def most_probable(self, features: Tensor) -> Tensor:
        """The most probable token `[n]` for each input `[n, hidden]`: the same as by all logits, but for rounding."""
        found = torch.empty(len(features), dtype=torch.int64, device=features.device)
        left = torch.ones_like(found, dtype=torch.bool)
        while left.sum() >= FEW:
            rows = left.nonzero().squeeze(1)
            close, tokens = self._of_a_crowd(features[rows])
            if not len(close):
                break
            found[rows[close]] = tokens
            left[rows[close]] = False
        for part in left.nonzero().squeeze(1).split(ROWS_AT_ONCE):
            found[part] = argmax(features[part] @ self.weight.T)
        return found

    def _of_a_crowd(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Which inputs lie close to the one with the nearest neighbours, and the tokens of those; none if it won't pay.

        The logits at that one, p, say its token t, and how far from p any other token v can first win:
        (w_t - w_v) . p / |w_t - w_v|. An input nearer to p than that has another token than v. So the inputs up to some
        distance have their tokens among those that can win by then; the distance that saves most is taken.
        """
        none = torch.empty(0, dtype=torch.int64, device=features.device)
        features32, size = features.float(), len(self.weight)
        distances = torch.cdist(features32, features32)
        quarter = distances.kthvalue(len(features) // 4).values
        center = quarter.argmin()
        if quarter[center] > features32[center].norm() / 2:
            return none, none
        logits = (self.weight @ features[center]).float()
        token = logits.argmax()
        inner = (self.weight @ self.weight[token]).float()
        apart = (self._squares + self._squares[token] - 2 * inner).clamp(min=0).sqrt()
        reach, tokens = ((logits[token] - logits) / apart).nan_to_num(0).sort()  # 0 / 0: the token itself, or its like
        near, rows = distances[center].sort()
        possible = torch.searchsorted(reach, 1.001 * near, right=True)  # 1.001: products are rounded
        saved = torch.arange(1, len(rows) + 1, device=rows.device) * (size - possible)
        last = saved.argmax()
        if saved[last] < FEW * size:
            return none, none
        close, candidates = rows[: last + 1], tokens[: possible[last]].sort().values
        return close, candidates[argmax(features[close] @ self.weight[candidates].T)]


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
