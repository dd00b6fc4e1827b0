"""The output layer, a matrix with a row per token: cross-entropy, whole or sampled, and the most probable tokens.

The logits of all inputs never exist at once. The gradients of the cross-entropy are computed with the loss, block by
block, so that no logits are kept or computed again for the backward pass. Its condition: the gradient of the losses is
proportional to counts that are known in the forward pass.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from calm_core.config.model_config import padded_vocabulary
from calm_core.model import costs as of
from calm_core.model import pointwise
from calm_core.model.costs import FLOAT32, Activations, Kernels, Load, Product, logit_rows

ROWS_AT_ONCE = 256  # inputs whose logits are held at a time: 32 MB at V = 32,000 in float32

LOGITS_AT_ONCE = 1 << 21  # logits searched at a time for the largest: 8 MB, which stay in the processor's cache


def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    counts: Tensor | None = None,
    offsets: Tensor | None = None,
    vocabulary: int | None = None,
    group: dist.ProcessGroup | None = None,
    compiled: bool = False,
    rows: int | None = None,
) -> Tensor:
    """-log P(target) in nats `[n]` under the softmax of the logits `features [n, r] @ weight [V, r].T + offsets [V]`.

    Products run in the inputs' dtype; softmax, losses and sums over blocks in float32 (float64 for float64).

    The ranks of a `group` divide the rows of one matrix equally, in order, and have the same features, targets and
    counts. Each gets the losses, the gradient of its rows, and its part of the features' gradient, to be summed.

    Args:
        features: the inputs.
        weight: this rank's rows of the matrix.
        targets: tokens.
        counts: `[n]`, at least 0, to which the gradient of the losses is proportional; None if it is one number.
        offsets: of this rank's rows.
        vocabulary: tokens; further rows pad the matrix and have probability 0. None: all rows are tokens.
        group: the ranks among which the vocabulary is divided.
        compiled: whether the work between the products is compiled.
        rows: inputs in a block; None: as many as the device works well with.
    """
    part = _Part(len(weight), vocabulary, group, offsets, compiled)
    rows = rows or logit_rows(len(weight), features.device.type)
    if torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad):
        counts = torch.ones(len(targets), device=features.device) if counts is None else counts
        return _WithGradients.apply(features, weight, targets, counts, part, rows)
    blocks = zip(features.split(rows), targets.split(rows), strict=True)
    return torch.cat([part.softmax(part.logits(x, weight), goals).nats for x, goals in blocks])


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


def sampled_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, keys: Tensor, count: int) -> Tensor:
    """An estimate of the mean cross-entropy of B samples, for which the logits of `count` tokens each are computed.

    These are all tokens that occur in the sample and, of the others, those with the lowest keys. The drawn ones stand
    for all m that do not occur: each of r counts m / r times in the softmax's denominator, whose estimate is unbiased
    (stratified sampling). With `count` = V the cross-entropy is exact.

    Args:
        hidden: `[B, n, d]`.
        weight: `[V, d]`.
        targets: `[B, n]`, at most `count` different ones in a sample.
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


class _Softmax(NamedTuple):
    """What is known of the softmax of a block of n inputs over the whole vocabulary.

    Attributes:
        shift: the largest logit, which all are lowered by, `[n, 1]`.
        total: the sum of all exponentials, lowered by the same, `[n, 1]`.
        nats: of the targets, `[n]`.
        goals: the rows of the targets in this rank's matrix, `[n, 1]`; of another rank's, any row.
        own: whether this rank has the target, `[n, 1]`; None if it has all.
    """

    shift: Tensor
    total: Tensor
    nats: Tensor
    goals: Tensor
    own: Tensor | None = None


class _Part:
    """A rank's rows of the matrix."""

    def __init__(
        self, rows: int, vocabulary: int | None, group: dist.ProcessGroup | None, offsets: Tensor | None, compiled: bool
    ) -> None:
        self.rows, self.group, self.offsets = rows, group, offsets
        self.first = 0 if group is None else rows * dist.get_rank(group)
        self.tokens = rows if vocabulary is None else min(rows, max(0, vocabulary - self.first))
        self._sums, self._slope = pointwise.softmax_sums, pointwise.softmax_slope
        if compiled:
            self._sums, self._slope = pointwise.compiled(self._sums), pointwise.compiled(self._slope)

    def logits(self, features: Tensor, weight: Tensor) -> Tensor:
        """Of these rows, `[n, V]`, -inf for those that are not tokens."""
        logits = features @ weight.T
        if self.offsets is not None:
            logits = logits + self.offsets
        if self.tokens < self.rows:
            logits[:, self.tokens :] = -torch.inf
        return logits

    def softmax(self, logits: Tensor, targets: Tensor) -> _Softmax:
        """Of logits `[n, V]` and targets `[n]`. The ranks of a group exchange one message."""
        shift, total = self._sums(logits)
        goals, own = targets.unsqueeze(1), None
        if self.group is not None:
            goals = goals - self.first
            own = (goals >= 0) & (goals < self.rows)
            goals = goals.clamp(0, self.rows - 1)
        goal = logits.gather(1, goals)
        if self.group is None:
            return _Softmax(shift, total, (total.log() - (goal - shift)).squeeze(1), goals)
        mine = torch.stack([shift, total, torch.where(own, goal.to(shift.dtype), 0.0)])
        every = mine.new_empty(dist.get_world_size(self.group) * len(mine), *shift.shape)
        dist.all_gather_into_tensor(every, mine, group=self.group)
        shifts, totals, goal_logits = every.unflatten(0, (-1, len(mine))).unbind(1)
        largest = shifts.amax(0)
        whole = (totals * (shifts - largest).exp()).sum(0)
        nats = whole.log() - (goal_logits.sum(0) - largest)
        return _Softmax(largest, whole, nats.squeeze(1), goals, own)

    def slope(self, logits: Tensor, known: _Softmax, counts: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient, with respect to the logits, of the sum of losses times counts."""
        scale = counts.to(known.total.dtype).unsqueeze(1)
        slope = self._slope(logits, known.shift, scale / known.total, dtype)
        # At the target the probability minus one, both in float32.
        at_goal = (torch.expm1(-known.nats.unsqueeze(1)) * scale).to(dtype)
        if known.own is not None:
            at_goal = torch.where(known.own, at_goal, slope.gather(1, known.goals))
        return slope.scatter_(1, known.goals, at_goal)


class _WithGradients(torch.autograd.Function):
    """Keeps the gradients of the sum of losses times counts, and multiplies them by what backward asks for."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, targets: Tensor, counts: Tensor, part: _Part, rows: int
    ) -> Tensor:
        precision = torch.promote_types(features.dtype, torch.float32)
        of_features = torch.empty_like(features)
        of_weight = torch.zeros(weight.shape, dtype=precision, device=weight.device)
        nats = []
        for start in range(0, len(targets), rows):
            block = slice(start, start + rows)
            logits = part.logits(features[block], weight)
            known = part.softmax(logits, targets[block])
            slope = part.slope(logits, known, counts[block], features.dtype)
            torch.mm(slope, weight, out=of_features[block])
            if weight.dtype == precision:
                torch.addmm(of_weight, slope.T, features[block], out=of_weight)
            else:
                of_weight += slope.T @ features[block]
            nats.append(known.nats)
        ctx.save_for_backward(of_features, of_weight, counts)
        ctx.dtype = weight.dtype
        return torch.cat(nats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_features, of_weight, counts = ctx.saved_tensors
        counts = counts.to(gradient.dtype)
        scale = gradient.sum() / counts.sum().clamp(min=torch.finfo(gradient.dtype).tiny)
        deviation = (gradient - scale * counts).abs().amax()
        wrong = deviation > 1e-3 * gradient.abs().amax()  # false if not finite: the optimizer rejects that step
        torch._assert_async(~wrong, "the gradient is not proportional to the counts")
        return (of_features * scale).to(of_features.dtype), (of_weight * scale).to(ctx.dtype), None, None, None, None


def kernels(load: Load, inputs: int, width: int, rows: int) -> Kernels:
    """Kernels for `inputs` of this width and a matrix of `rows`, divided among the tensor-parallel ranks.

    All products start in the forward pass, each once a block; those of the gradients count with the backward pass, as
    an evaluation has none. The backward pass multiplies the gradients by a number. Eagerly, the functions of
    `pointwise` pass over the logits of a block twelve times in float32; compiled, the sums read them twice, and the
    slope reads and writes them. The ranks exchange one message a block; with sequence parallelism they gather the
    inputs, and backward the gradients of the losses. Backward they sum the gradients of the inputs, and no product is
    left to hide that.
    """
    parallel, gathers, narrow = load.layout.tensor > 1, load.layout.sequence, load.width < FLOAT32
    part = padded_vocabulary(rows) // load.layout.tensor
    blocks, table, logits = -(-inputs // logit_rows(part, load.device)), part * width, inputs * part
    convert = FLOAT32 + load.width if narrow else 0
    if load.compiled:
        softmax = of.pointwise(4 * load.width * logits, 0, kernels=(2 * blocks, 0))
    else:
        passes = (12 * FLOAT32 + 3 * convert) * logits
        softmax = of.pointwise(passes, 0, kernels=((11 if narrow else 8) * blocks, 0))
    padding = padded_vocabulary(rows) > rows
    added = (FLOAT32 + convert) * table * blocks if narrow else 0  # in float32 the product itself accumulates
    products = (Product.of(load.width, inputs, width, part, blocks),)
    return softmax + Kernels(
        forward=2 + blocks * (12 + 2 * narrow + padding + (16 + narrow) * parallel),
        backward=16 + narrow,
        moved_forward=FLOAT32 * table + added,
        moved_backward=2 * load.width * inputs * width + (2 * FLOAT32 + convert) * table,
        messages_forward=blocks * parallel + gathers,
        messages_backward=parallel + gathers,
        products_forward=products,
        products_backward=2 * products,
    )


def activations(load: Load, inputs: int, width: int, rows: int) -> Activations:
    """Bytes for such inputs and such a matrix.

    Kept: the gradients of the inputs, and of the matrix in float32; losses and counts. In the forward pass, the logits
    of a block with its exponentials (eager also in float32), the part of the matrix's gradient that a block of bf16
    adds, and the inputs of all ranks with sequence parallelism. In the backward pass, both gradients multiplied, that
    of the matrix also converted to bf16.
    """
    narrow, part = load.width < FLOAT32, padded_vocabulary(rows) // load.layout.tensor
    table, features = part * width, inputs * width * load.width
    added = table * load.width if narrow else 0
    each = 2 * load.width if load.compiled or not narrow else load.width + 2 * FLOAT32
    block = min(inputs, logit_rows(part, load.device)) * part * each
    return Activations(
        kept=features + FLOAT32 * table + 2 * FLOAT32 * inputs,
        forward=block + added + (features if load.layout.sequence else 0),
        backward=features + FLOAT32 * table + added,
    )
