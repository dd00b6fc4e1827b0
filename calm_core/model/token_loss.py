"""The token side loss: cross-entropy of the next chunk's tokens from the backbone's hidden state, in training alone.

It is not part of the paper. The energy score alone teaches the backbone slowly, since its gradient reaches the hidden
state through draws; a classifier of the next tokens teaches it directly. The classifier is a training aid: it is saved
in checkpoints to resume a run, and neither sampling nor scoring nor an exported model has it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from calm_core.config.model_config import ModelShape, padded_vocabulary
from calm_core.model import costs as of
from calm_core.model.costs import FLOAT32, Activations, Kernels, Load, Weights
from calm_core.model.layers import column, cross_entropy, linear, own_positions, split_positions, vocabulary_logits
from calm_core.model.noise import Noise

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

    def forward(self, hidden: Tensor, tokens: Tensor, noise: Noise) -> Tensor:
        """Nats per token at each position this rank works on, `[S', B]` float32; unbiased where positions are left out.

        Args:
            hidden: `[S', B, d]`.
            tokens: of the chunk that follows each position, `[S, B, K]`.
            noise: which positions (from the sample's offset on, every `every`-th) and which of the K tokens.
        """
        every = self.side.every
        offset = noise.integers("token_loss/position", every, 1)
        chosen = _every(hidden, every, offset)
        features = self.features(hidden.gather(0, chosen.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])))
        wanted = tokens.gather(0, _every(tokens, every, offset).unsqueeze(-1).expand(-1, -1, self.k))
        losses = self._of_tokens(features, wanted, noise).mean(-1)
        return losses.new_zeros(hidden.shape[:2]).scatter(0, chosen, losses * every)

    def _of_tokens(self, features: Tensor, wanted: Tensor, noise: Noise) -> Tensor:
        """Nats of each predicted token, `[S', B, tokens]`, from features and the chunks `[S, B, K]`."""
        if not self.side.rank:
            return torch.stack([self._nats(m, features, wanted[..., i]) for i, m in enumerate(self.out)], -1)
        features = features.unflatten(-1, (-1, self.side.rank))
        if self.side.tokens == "random":
            token = noise.integers("token_loss/token", self.k, len(wanted)).unsqueeze(-1)
            wanted = wanted.gather(-1, token)
            own = own_positions(token, self.config).unsqueeze(-1)
            features = features.gather(2, own.expand(-1, -1, -1, self.side.rank))
        wanted = wanted[..., : features.shape[2]]
        nats = self._nats(self.out[0], features.flatten(1, 2), wanted.flatten(1, 2))
        return nats.unflatten(1, features.shape[1:3])

    def _nats(self, matrix: nn.Module, features: Tensor, wanted: Tensor) -> Tensor:
        logits = vocabulary_logits(matrix, features, self.vocabulary, self.config)
        return split_positions(cross_entropy(logits, wanted.contiguous(), self.config), self.config)


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
    """The parameters, of which the matrix that all tokens share counts `uses` times; none without a token loss."""
    if shape.token_loss is None:
        return Weights()
    d, rank = shape.backbone.hidden, shape.token_loss.rank
    if not rank:
        return of.column(d, shape.vocabulary, bias=False) * _predicted(shape)
    return of.linear(d, _predicted(shape) * rank) + of.column(rank, shape.vocabulary, bias=False) * uses


def applied(shape: ModelShape) -> Weights:
    """The weights as they are applied at a position that learns (one of `every`)."""
    return weights(shape, _learned(shape)) if shape.token_loss else Weights()


def training_flops(shape: ModelShape, positions: int) -> int:
    """FLOPs of a sequence of S positions, forward and backward."""
    return applied(shape).training * positions // shape.token_loss.every if shape.token_loss else 0


def kernels(shape: ModelShape, load: Load) -> Kernels:
    """Kernels of one micro-batch: two products, and the passes of the cross-entropy over the float32 logits."""
    side = shape.token_loss
    if side is None:
        return Kernels()
    logits = load.rows // side.every * _learned(shape) * padded_vocabulary(shape.vocabulary) // load.layout.tensor
    features = Kernels()
    if side.rank:
        features = of.product() + of.bias_kernel(load.whole(side.rank * _learned(shape)) // side.every)
    passes = of.pointwise(13 * FLOAT32 * logits, 6 * FLOAT32 * logits, kernels=(25, 16))
    return features + of.column_product(load) + passes


def activations(shape: ModelShape, load: Load) -> Activations:
    """Bytes for one micro-batch.

    Kept: the chosen hidden states, read by the first matrix; the features of the learned tokens, read by the second;
    the probabilities of this rank's part of the vocabulary in float32. Alive in addition: the logits (forward) and
    their gradient (backward).
    """
    side = shape.token_loss
    if side is None:
        return Activations(0)
    learned = _learned(shape)
    logits = load.rows // side.every * learned * padded_vocabulary(shape.vocabulary) // load.layout.tensor
    features = side.rank * learned if side.rank else 0
    kept = (load.whole(shape.backbone.hidden) + load.whole(features)) // side.every + logits * FLOAT32
    converted = FLOAT32 if load.width == FLOAT32 else FLOAT32 + load.width
    return Activations(kept, logits * converted, logits * FLOAT32)


def describe(shape: ModelShape) -> str:
    """What is learned beside the head's loss, for the plan of a run."""
    side = shape.token_loss
    which = {"all": f"all {shape.k} tokens", "first": "the first token", "random": f"one of the {shape.k} tokens"}
    where = "every position" if side.every == 1 else f"one of {side.every} positions"
    how = f"rank {side.rank}" if side.rank else "full rank"
    until = "" if side.until == 1 else f", for the first {side.until:g} of the run"
    return f"weight {side.weight:g}, {how}, {which[side.tokens]} at {where}{until}"
