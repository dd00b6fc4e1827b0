"""The encoder of a frozen autoencoder, its first stage folded into a table.

Up to and including the join of a chunk's tokens, what the encoder adds for a token depends only on the token and its
index in the chunk. So this stage is a table of K x V vectors, and a chunk's hidden state is the sum of K of its rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder


class FoldedEncoder:
    """`encode` of an autoencoder whose weights do not change, for a fraction of the FLOPs.

    The table has K x V x hidden numbers of the autoencoder's dtype and is computed once.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder
        self.latent = autoencoder.config.latent
        self.device = autoencoder.embedding.weight.device
        self._offsets = torch.arange(autoencoder.k, device=self.device) * autoencoder.vocab_size
        with torch.no_grad():
            states = autoencoder.encoder_token_block(autoencoder.embedding.weight)
            join = autoencoder.encoder_join.weight.chunk(autoencoder.k, dim=1)
            self._table = torch.cat([states @ weight.T for weight in join])  # [K·V, hidden]

    @torch.no_grad()
    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `[n, K]` -> posterior mean and log standard deviation, `[n, l]` each."""
        model = self._autoencoder
        joined = F.embedding_bag(tokens + self._offsets, self._table, mode="sum") + model.encoder_join.bias
        hidden = model.encoder_norm(model.encoder_chunk_block(joined))
        mean, log_std = model.encoder_posterior(hidden).chunk(2, dim=-1)
        return mean, log_std
