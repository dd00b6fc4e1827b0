"""The token side loss: cross-entropy of the next chunk's tokens from the backbone's hidden state, in training alone.

It is not part of the paper. The energy score alone teaches the backbone slowly, since its gradient reaches the hidden
state through draws; a classifier of the next tokens teaches it directly. The classifier is a training aid: it is saved
in checkpoints to resume a run; sampling, scoring and exported models do not use it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from calm_core.config.model_config import ModelShape, padded_vocabulary
from calm_core.model import costs as of
from calm_core.model import output_layer
from calm_core.model.costs import Activations, Kernels, Load, Weights
from calm_core.model.heads import Target
from calm_core.model.layers import column, linear, own_positions, vocabulary_nats
from calm_core.model.noise import Noise
from calm_core.model.pointwise import fuses

if TYPE_CHECKING:
    from calm_core.megatron import TransformerConfig

NAME = "token_loss."  # what the global names of its parameters begin with


class TokenLoss(nn.Module):
    """Cross-entropy of K tokens, of the first, or of a random one, at every `every`-th position.

    With a rank r, one matrix takes the hidden state to r features for each token, and a second one, shared by the K
    tokens, takes those to logits; with rank 0 each token has a matrix from the hidden state to logits.
    """

    def __init__(self, config: "TransformerConfig", shape: ModelShape) -> None:
        super().__init__()
        self.config, self.side, self.vocabulary = config, shape.token_loss, shape.vocabulary
        d, rows, tokens = config.hidden_size, padded_vocabulary(shape.vocabulary), _predicted(shape)
        self.k = shape.k
        if self.side.rank:
            self.features = linear(config, d, tokens * self.side.rank)
            self.out = nn.ModuleList([column(config, self.side.rank, rows, bias=False)])
        else:
            self.features = nn.Identity()
            self.out = nn.ModuleList(column(config, d, rows, bias=False) for _ in range(tokens))

    def forward(self, hidden: Tensor, target: Target, noise: Noise) -> Tensor:
        """Nats per token at each position this rank works on, `[S', B]` float32; unbiased where positions are skipped.

        Args:
            hidden: `[S', B, d]`.
            target: the chunk that follows each position; of it the tokens, and the weights of the positions.
            noise: which positions (from the sample's offset on, every `every`-th) and which of the K tokens.
        """
        every = self.side.every
        offset = noise.integers("token_loss/position", every, 1)
        chosen = _every(hidden, every, offset)
        features = self.features(hidden.gather(0, chosen.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])))
        learned = _every(target.tokens, every, offset)
        wanted = target.tokens.gather(0, learned.unsqueeze(-1).expand(-1, -1, self.k))
        weights = None if target.weights is None else target.weights.gather(0, learned)
        losses = self._of_tokens(features, wanted, weights, noise).mean(-1)
        return losses.new_zeros(hidden.shape[:2]).scatter(0, chosen, losses * every)

    def _of_tokens(self, features: Tensor, wanted: Tensor, weights: Tensor | None, noise: Noise) -> Tensor:
        """Nats of each predicted token, `[S', B, tokens]`, of the chunks `[S, B, K]` at positions of these weights."""
        if not self.side.rank:
            return torch.stack([self._nats(m, features, wanted[..., i], weights) for i, m in enumerate(self.out)], -1)
        features = features.unflatten(-1, (-1, self.side.rank))
        if self.side.tokens == "random":
            token = noise.integers("token_loss/token", self.k, len(wanted)).unsqueeze(-1)
            wanted = wanted.gather(-1, token)
            own = own_positions(token, self.config).unsqueeze(-1)
            features = features.gather(2, own.expand(-1, -1, -1, self.side.rank))
        wanted = wanted[..., : features.shape[2]]
        nats = self._nats(self.out[0], features.flatten(1, 2), wanted.flatten(1, 2), weights)
        return nats.unflatten(1, features.shape[1:3])

    def _nats(self, matrix: nn.Module, features: Tensor, wanted: Tensor, weights: Tensor | None) -> Tensor:
        """Of tokens `[S, n]`, where n is B or the B x T tokens of B chunks, whose positions have weights `[S, B]`."""
        counts = None if weights is None else weights.repeat_interleave(wanted.shape[1] // weights.shape[1], 1)
        return vocabulary_nats(matrix, features, wanted, self.vocabulary, self.config, counts, compiled=fuses(self))


def _predicted(shape: ModelShape) -> int:
    """Tokens of a chunk that have features of their own."""
    return 1 if shape.token_loss.tokens == "first" else shape.k


def _learned(shape: ModelShape) -> int:
    """Tokens of a chunk that a position learns in a step."""
    return shape.k if shape.token_loss.tokens == "all" else 1


def _every(x: Tensor, every: int, offset: Tensor) -> Tensor:
    """The positions `[S / every, B]` of `x` `[S, B, ...]` that are `offset` `[1, B]` and every `every`-th after it."""
    return torch.arange(0, len(x), every, device=offset.device).unsqueeze(1) + offset


def weights(shape: ModelShape, uses: int = 1) -> Weights:
    """The parameters, the matrix that all tokens share counted `uses` times; none without a token loss."""
    if shape.token_loss is None:
        return Weights()
    d, rank = shape.backbone.hidden, shape.token_loss.rank
    if not rank:
        return of.vocabulary_matrix(d, shape.vocabulary) * _predicted(shape)
    return of.linear(d, _predicted(shape) * rank) + of.vocabulary_matrix(rank, shape.vocabulary) * uses


def applied(shape: ModelShape) -> Weights:
    """The weights as they are applied at a position that learns (one of `every`)."""
    return weights(shape, _learned(shape)) if shape.token_loss else Weights()


def training_flops(shape: ModelShape, positions: int) -> int:
    """FLOPs of a sequence of S positions, forward and backward."""
    return applied(shape).training * positions // shape.token_loss.every if shape.token_loss else 0


def kernels(shape: ModelShape, load: Load) -> Kernels:
    """Kernels of one micro-batch: the choice of positions, the features, and the cross-entropy."""
    side = shape.token_loss
    if side is None:
        return Kernels()
    d, learned, inputs = shape.backbone.hidden, _learned(shape), load.rows // side.every
    chosen = load.whole(d) // side.every
    # Backward, the gradient of all positions is filled with zeros, scattered into, and added to that of the head.
    choice = of.pointwise(2 * chosen, chosen + 4 * load.whole(d), kernels=(16, 7))
    if side.tokens == "random":
        choice += Kernels(forward=5, backward=2)
    if not side.rank:
        choice += Kernels(forward=learned, backward=learned - 1)
        return choice + output_layer.kernels(load, inputs, d, shape.vocabulary) * learned
    width = side.rank * _predicted(shape)
    features = of.product(load, load.own_rows // side.every, d, width)
    features += of.pointwise(0, load.whole(width) // side.every)
    return choice + features + output_layer.kernels(load, inputs * learned, side.rank, shape.vocabulary)


def activations(shape: ModelShape, load: Load) -> Activations:
    """Bytes for one micro-batch: of each matrix with full rank, or of one.

    The chosen hidden states are read by the matrix of the features, and kept for it.
    """
    side = shape.token_loss
    if side is None:
        return Activations(0)
    d, learned, inputs = shape.backbone.hidden, _learned(shape), load.rows // side.every
    chosen = load.whole(d) // side.every
    if side.rank:
        loss = output_layer.activations(load, inputs * learned, side.rank, shape.vocabulary)
        return Activations(chosen + loss.kept, loss.forward, loss.backward)
    loss = output_layer.activations(load, inputs, d, shape.vocabulary)
    return Activations(loss.kept * learned, chosen + loss.forward, chosen + loss.backward)


def describe(shape: ModelShape) -> str:
    """What is learned beside the head's loss, for the plan of a run."""
    side = shape.token_loss
    which = {"all": f"all {shape.k} tokens", "first": "the first token", "random": f"one of the {shape.k} tokens"}
    where = "every position" if side.every == 1 else f"one of {side.every} positions"
    how = f"rank {side.rank}" if side.rank else "full rank"
    until = "" if side.until == 1 else f", for the first {side.until:g} of the run"
    return f"weight {side.weight:g}, {how}, {which[side.tokens]} at {where}{until}"
