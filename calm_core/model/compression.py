"""Input compression: the K token embeddings of a chunk become one input vector of the backbone (paper, section 3.3)."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from calm_core.config.model_config import padded_vocabulary
from calm_core.model.layers import column, embedding, layer_norm, row
from calm_core.model.pointwise import add_bias, fused, silu
from calm_core.model.single_rank import SingleRank

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class InputCompression(nn.Module):
    """Embedding, then Linear(K d -> 2 d), SiLU, Linear(2 d -> d), LayerNorm.

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
