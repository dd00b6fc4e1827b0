"""The CALM network: input compression on the first pipeline stage, backbone on every stage, head on the last."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from calm_core.config.model_config import ModelShape, padded_vocabulary
from calm_core.model.attention import KeyValueCache
from calm_core.model.heads import HeadLoss, Target, head_module
from calm_core.model.layers import column, embedding, layer_norm, row
from calm_core.model.noise import Noise
from calm_core.model.pointwise import add_bias, fused, silu
from calm_core.model.single_rank import SingleRank, SingleRankBackbone
from calm_core.model.token_loss import TokenLoss

if TYPE_CHECKING:
    from calm_core.megatron import ModelType, TransformerConfig


class InputCompression(nn.Module):
    """From the K token embeddings of a chunk to one input vector of the backbone (paper, section 3.3).

    Embedding, then Linear(K d -> 2 d), SiLU, Linear(2 d -> d), LayerNorm.

    With `embedding_only`, the embedding of the one token alone: the input of the autoregressive baseline.
    """

    def __init__(
        self, config: "TransformerConfig | SingleRank", vocab_size: int, k: int, *, embedding_only: bool = False
    ) -> None:
        super().__init__()
        self.config, self.embedding_only = config, embedding_only
        d = config.hidden_size
        self.embedding = embedding(config, padded_vocabulary(vocab_size), d)
        if embedding_only:
            return
        self.expand = column(config, k * d, 2 * d)
        self.reduce = row(config, 2 * d, d)
        self.norm = layer_norm(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids `[B, S, K]` -> input vectors `[S, B, d]` (S/TP rows if sequence-parallel)."""
        embedded = self.embedding(tokens)  # [S, B, K, d] if scattered, else [B, S, K, d]
        if not self.config.sequence_parallel:
            embedded = embedded.transpose(0, 1)
        chunk = embedded.flatten(2).contiguous()
        if self.embedding_only:
            return chunk
        inner = fused(self, silu)(*self.expand(chunk))
        return self.norm(add_bias(*self.reduce(inner)))


class CalmModel(nn.Module):
    """A model part: what one pipeline stage holds of the network, or one of its parts under interleaving.

    The first part compresses tokens to vectors, the last one holds the head and computes the loss. A part that is not
    the first gets the hidden states of the previous one through `set_input_tensor`, from Megatron-core's schedules.
    With a `SingleRank` configuration it is the whole network, for inference.
    """

    def __init__(
        self,
        config: "TransformerConfig | SingleRank",
        shape: ModelShape,
        *,
        first: bool = True,
        last: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.shape, self.first, self.last, self.vp_stage = shape, first, last, vp_stage
        if first:
            self.compression = InputCompression(
                config, shape.vocabulary, shape.k, embedding_only=shape.head.reads_tokens
            )
        if isinstance(config, SingleRank):
            self.backbone = SingleRankBackbone(config, shape.backbone)
        else:
            from calm_core.model.backbone import Backbone

            self.backbone = Backbone(config, shape.backbone.rope_base, first=first, last=last, vp_stage=vp_stage)
        if last:
            self.head = head_module(shape.head.kind).build(config, shape)
            self.token_loss = TokenLoss(config, shape) if shape.token_loss else None

    @property
    def model_type(self) -> "ModelType":
        """What Megatron-core's schedules ask for."""
        from calm_core.megatron import ModelType

        return ModelType.encoder_or_decoder

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Set the hidden states of the previous part (called by the schedule)."""
        self.backbone.set_input_tensor(input_tensor[0])

    def hidden(self, tokens: Tensor | None, cache: KeyValueCache | None = None) -> Tensor:
        """Hidden states `[S, B, d]` of this part for the chunks `tokens` `[B, S, K]`, which the first part reads."""
        return self.backbone(self.compression(tokens) if self.first else None, cache)

    def forward(
        self, tokens: Tensor | None, target: Target | None, noise: Noise, side: bool = True
    ) -> Tensor | HeadLoss:
        """The losses against `target` on the last part, the hidden states for the next part on any other.

        Without `side` a model skips its token loss, whose weights then have zero gradients.
        """
        hidden = self.hidden(tokens)
        if not self.last:
            return hidden
        loss = self.head.loss(hidden, target, noise)
        if self.token_loss is None:
            return loss
        if not side:
            zero = sum(parameter.sum() for parameter in self.token_loss.parameters()) * 0.0
            return loss._replace(side=zero.float().expand_as(loss.loss))
        nats = self.token_loss(hidden, target, noise)
        return HeadLoss(loss.loss, {**loss.terms, "token_loss": nats.detach()}, self.shape.token_loss.weight * nats)
