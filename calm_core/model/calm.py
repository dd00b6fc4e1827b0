"""The CALM network of one pipeline stage: input compression first, head last, backbone on every stage."""

from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from calm_core.config.model_config import ModelShape
from calm_core.model.backbone import Backbone
from calm_core.model.cache import KeyValueCache
from calm_core.model.compression import InputCompression
from calm_core.model.heads.protocol import HeadLoss, Target
from calm_core.model.heads.registry import head_module
from calm_core.model.noise import Noise


class CalmModel(MegatronModule):
    """The part of the network that one stage (or one interleaved chunk of a stage) holds.

    The first stage turns tokens into vectors, the last one owns the head and the loss; those between pass hidden
    states on through `set_input_tensor`, as Megatron-core's schedules do.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(
        self,
        config: TransformerConfig,
        shape: ModelShape,
        *,
        first: bool = True,
        last: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.shape, self.first, self.last, self.vp_stage = shape, first, last, vp_stage
        if first:
            self.compression = InputCompression(
                config, shape.vocabulary, shape.k, embedding_only=shape.head.reads_tokens
            )
        self.backbone = Backbone(config, shape.backbone.rope_base, first=first, last=last, vp_stage=vp_stage)
        if last:
            self.head = head_module(shape.head.kind).build(config, shape)

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Receive the previous stage's hidden states (called by the schedule)."""
        self.backbone.set_input_tensor(input_tensor[0])

    def hidden(self, tokens: Tensor | None, cache: KeyValueCache | None = None) -> Tensor:
        """Hidden states `[S, B, d]` of this stage for the chunks `tokens` `[B, S, K]`, which the first stage reads."""
        return self.backbone(self.compression(tokens) if self.first else None, cache)

    def forward(self, tokens: Tensor | None, target: Target | None, noise: Noise) -> Tensor | HeadLoss:
        """The head's loss against `target` on the last stage, the hidden states for the next stage on any other."""
        hidden = self.hidden(tokens)
        return self.head.loss(hidden, target, noise) if self.last else hidden
