"""The encoder of a frozen autoencoder, its first stage folded into tables.

What the encoder does before it joins the tokens of a chunk depends on each token and its place alone. So all of it, the
join included, is one table of vectors for each of the K places; a chunk's hidden state is the sum of K of its rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder


class FoldedEncoder:
    """`encode` of an autoencoder whose weights no longer change, at a fraction of the work.

    The table takes K·V·hidden numbers of the autoencoder's type and is made once.
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
