"""The decoder's output layer: the most probable tokens of many inputs, with no more of the logits than that takes."""

import torch
from torch import Tensor

ROWS_AT_ONCE = 256  # rows of logits held: 32 MB at V = 32,000 in float32
FEW = 16  # inputs that are not worth a search for what they have in common
SHARE = 16  # of a vocabulary, 1 / SHARE is compared where inputs lie close together


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
        left = torch.arange(len(features), device=features.device)
        while len(left) >= FEW and len(self.weight) >= FEW * SHARE:
            close, tokens = self._of_a_crowd(features[left])
            if len(tokens) < FEW:
                break
            found[left[close]] = tokens
            left = left[~close]
        for part in left.split(ROWS_AT_ONCE):
            found[part] = argmax(features[part] @ self.weight.T)
        return found

    def _of_a_crowd(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Which inputs lie close to the one with the nearest neighbours, `[n]` bool, and the tokens of those.

        The logits at that one, p, say its token t, and how far from p any other token v can first win:
        (w_t - w_v) . p / |w_t - w_v|. An input nearer to p than that has another token than v. So an input nearer
        than all tokens but a few has its token among t and those few.
        """
        features32 = features.float()
        distances = torch.cdist(features32, features32)
        quarter = distances.kthvalue(max(1, len(features) // 4)).values
        center = quarter.argmin()
        if quarter[center] > features32[center].norm() / 2:  # no crowd: too far apart for any bound
            return torch.zeros_like(quarter, dtype=torch.bool), center.new_empty(0)
        logits = (self.weight @ features[center]).float()
        token = logits.argmax()
        inner = (self.weight @ self.weight[token]).float()
        apart = (self._squares + self._squares[token] - 2 * inner).clamp(min=0).sqrt()
        reach = ((logits[token] - logits) / apart).nan_to_num(0)  # 0 / 0: the token itself, or its like
        nearest = reach.topk(len(reach) // SHARE + 1, largest=False, sorted=True)
        close = distances[center] < 0.999 * nearest.values[-1]
        candidates = nearest.indices[:-1].sort().values
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
