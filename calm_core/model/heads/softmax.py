"""The softmax head: a distribution over the next token; with chunks of one token, the autoregressive baseline."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calm_core.config.model_config import ModelShape, padded_vocabulary
from calm_core.model import costs as of
from calm_core.model import output_layer
from calm_core.model.costs import Activations, HeadCosts, Kernels, Load, target_bytes
from calm_core.model.heads import HeadLoss, Target
from calm_core.model.layers import (
    all_positions,
    column,
    own_positions,
    tensor_group,
    vocabulary_logits,
    vocabulary_nats,
    without_padding,
)
from calm_core.model.noise import Noise
from calm_core.model.pointwise import fuses

if TYPE_CHECKING:
    from calm_core.megatron import TransformerConfig

PROBABILITY_BYTES = 1 << 28  # float64 probabilities that a draw holds at a time; at least those of a position


class SoftmaxHead(nn.Module):
    """log P(token | h) = log softmax(W h) over the vocabulary, whose rows are divided among tensor-parallel ranks.

    `vocabulary_nats` has the losses, and what sequence-parallel ranks exchange for them.
    """

    def __init__(self, config: "TransformerConfig", vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.out = column(config, config.hidden_size, padded_vocabulary(vocabulary), bias=False)

    def loss(self, hidden: Tensor, target: Target, noise: Noise) -> HeadLoss:
        """Cross-entropy in nats of the next token; uses no noise."""
        return HeadLoss(self._nats(hidden, target.tokens.squeeze(-1), target.weights), {})

    def log_probabilities(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """log P of one token at each position, float32 `[S', B]`: hidden `[S', B, d]`, tokens `[S, B]`."""
        return -self._nats(hidden, tokens)

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

    def _nats(self, hidden: Tensor, tokens: Tensor, weights: Tensor | None = None) -> Tensor:
        return vocabulary_nats(self.out, hidden, tokens, self.vocabulary, self.config, weights, compiled=fuses(self))

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
    return HeadCosts(of.vocabulary_matrix(shape.backbone.hidden, shape.vocabulary))


def kernels(shape: ModelShape, load: Load) -> Kernels:
    """Of the final norm, the cross-entropy, and backward the mean of its losses."""
    d = shape.backbone.hidden
    loss = output_layer.kernels(load, load.rows, d, shape.vocabulary)
    return of.rms_norm_kernels(load, d) + loss + Kernels(backward=2)


def activations(shape: ModelShape, load: Load) -> Activations:
    """Of the final norm and the cross-entropy.

    Kept: what the norm keeps; what the cross-entropy keeps; the targets. Its inputs, which the norm returns, exist in
    the forward pass.
    """
    d = shape.backbone.hidden
    loss = output_layer.activations(load, load.rows, d, shape.vocabulary)
    kept = load.rms_norm(d) + loss.kept + target_bytes(shape, load)
    return Activations(kept, loss.forward + load.whole(d), loss.backward)
