"""The softmax head: a distribution over the next token; with chunks of one token, the autoregressive baseline."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calm_core.config.model_config import ModelShape, padded_vocabulary
from calm_core.model import costs as of
from calm_core.model.costs import FLOAT32, Activations, HeadCosts, Kernels, Load, target_bytes
from calm_core.model.heads import HeadLoss, Target
from calm_core.model.layers import (
    all_positions,
    column,
    cross_entropy,
    own_positions,
    split_positions,
    tensor_group,
    vocabulary_logits,
    without_padding,
)
from calm_core.model.noise import Noise

if TYPE_CHECKING:
    from calm_core.megatron import TransformerConfig

PROBABILITY_BYTES = 1 << 28  # float64 probabilities that a draw holds at a time; at least those of a position


class SoftmaxHead(nn.Module):
    """log P(token | h) = log softmax(W h) over the vocabulary, whose rows are divided among tensor-parallel ranks.

    With sequence parallelism the matrix gathers the hidden states, so each rank has its part of the logits of all
    positions, but returns the losses of its own positions only. The loss of one position needs gradients in every
    rank's part of the vocabulary, so the backward pass gathers the gradients of all losses (`split_positions`). Each
    rank then computes the gradient of the whole loss for its rows of W; the matrix sums the gradients of the hidden
    states over the ranks and returns to each those of its own positions.
    """

    def __init__(self, config: "TransformerConfig", vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.out = column(config, config.hidden_size, padded_vocabulary(vocabulary), bias=False)

    def loss(self, hidden: Tensor, target: Target, noise: Noise) -> HeadLoss:
        """Cross-entropy in nats of the next token; uses no noise."""
        return HeadLoss(-self.log_probabilities(hidden, target.tokens.squeeze(-1)), {})

    def log_probabilities(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """log P of one token at each position, float32 `[S', B]`: hidden `[S', B, d]`, tokens `[S, B]`."""
        return -split_positions(cross_entropy(self.logits(hidden), tokens.contiguous(), self.config), self.config)

    @torch.no_grad()
    def sample(self, hidden: Tensor, noise: Noise, samples: int) -> Tensor:
        """`samples` independent tokens per position, `[S', B, N, 1]`.

        The product is one, since its rounding may depend on its number of rows; what follows it goes by blocks of
        positions, whose float32 and float64 copies are far larger than the logits in the weights' precision.
        """
        draws = noise.uniform("softmax/sample", all_positions(hidden, self.config), samples)
        logits, _ = self.out(hidden)
        rows = max(1, PROBABILITY_BYTES // (torch.float64.itemsize * logits.shape[-1]))
        tokens = [
            _draw(without_padding(part, self.vocabulary, self.config), own, *tensor_group(self.config))
            for part, own in zip(logits.flatten(0, 1).split(rows), draws.flatten(0, 1).split(rows), strict=True)
        ]
        return own_positions(torch.cat(tokens).view_as(draws), self.config).unsqueeze(-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's part of the logits of all positions, float32 `[S, B, V / TP]`; -inf for padding rows."""
        return vocabulary_logits(self.out, hidden, self.vocabulary, self.config)


def _draw(logits: Tensor, draws: Tensor, group: dist.ProcessGroup | None, rank: int) -> Tensor:
    """Tokens `[n, N]` at which the cumulative distribution passes the uniform draws `[n, N]`.

    No rank of a group has all the logits `[n, V / TP]`: each counts how many of its tokens a draw has passed, and
    the sum of the counts is the token.
    """
    largest = logits.max(dim=-1, keepdim=True).values
    if group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    # float64: in float32 the sum over a large vocabulary would lose rare tokens to rounding.
    passed = (logits - largest).double().exp_().cumsum_(dim=-1)
    totals = passed[..., -1:].unsqueeze(0)
    if group is not None:
        totals = passed.new_empty(dist.get_world_size(group), *passed.shape[:-1], 1)
        dist.all_gather(list(totals), passed[..., -1:].contiguous(), group)
    sought = draws.double() * totals.sum(0) - totals[:rank].sum(0)
    tokens = torch.searchsorted(passed, sought, right=True)
    if group is not None:
        dist.all_reduce(tokens, group=group)
    return tokens


def build(config: "TransformerConfig", shape: ModelShape) -> SoftmaxHead:
    """The head of a model of this shape."""
    return SoftmaxHead(config, shape.vocabulary)


def costs(shape: ModelShape) -> HeadCosts:
    """One matrix, applied once per position in training and sampling alike, however many tokens are drawn."""
    return HeadCosts(of.column(shape.backbone.hidden, shape.vocabulary, bias=False))


def kernels(shape: ModelShape, load: Load) -> Kernels:
    """Of the final norm, the logits and the cross-entropy, which passes over the float32 logits several times.

    Forward: convert, mask, maximum, subtract, exponentials, sum, divide; backward: two passes, mask, convert.
    """
    logits = load.rows * padded_vocabulary(shape.vocabulary) // load.layout.tensor
    convert = logits * (FLOAT32 + load.width) if load.width < FLOAT32 else 0
    sums = 3 if load.layout.tensor > 1 else 0
    return (
        of.rms_norm_kernels(load, shape.backbone.hidden)
        + of.column_product(load)
        + of.pointwise(convert, convert)
        + of.pointwise(13 * FLOAT32 * logits, 6 * FLOAT32 * logits, kernels=(21, 12))
        + Kernels(messages_forward=sums)
    )


def activations(shape: ModelShape, load: Load) -> Activations:
    """Of the final norm, the logits and the cross-entropy.

    Kept: what the norm keeps; the hidden states, which the matrix reads; the probabilities of this rank's part of the
    vocabulary in float32, which the cross-entropy keeps; the targets. In the forward pass the float32 logits exist in
    addition, with bf16 weights also those in bf16; in the backward pass, the gradient of the logits.
    """
    d, logits = shape.backbone.hidden, load.rows * padded_vocabulary(shape.vocabulary) // load.layout.tensor
    kept = load.rms_norm(d) + load.whole(d) + logits * FLOAT32 + target_bytes(shape, load)
    converted = FLOAT32 if load.width == FLOAT32 else FLOAT32 + load.width
    return Activations(kept, logits * converted, logits * FLOAT32, load.gathered(d))
