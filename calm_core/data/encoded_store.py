"""A token store read as the chunk store that an autoencoder makes of it: latents are computed on reading."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, FoldedEncoder
from calm_core.config.data_config import Verify
from calm_core.data.chunks import ENCODED_AT_ONCE, encoded, require_tokenizer, source_of_chunks
from calm_core.data.store import ALL, TokenStore
from calm_core.io import source_hash


class EncodedStore(TokenStore):
    """One split of a token store, its documents packed into chunks; a row is a chunk, with the columns of `ChunkStore`.

    The encoder is built on the autoencoder's device when the first latent is read. A training run reads only
    the tokens, in a thread that runs during the step before, and has them encoded in the step.
    """

    read_columns = ("tokens",)

    def __init__(
        self,
        folder: Path | str,
        split: str,
        autoencoder: Autoencoder,
        verify: Verify = "auto",
        share: slice = ALL,
        encoder: Callable[[], FoldedEncoder] | None = None,
    ) -> None:
        """Open and verify one split, as `Store` does.

        `encoder` returns the autoencoder's encoder, whose tables several stores share.

        Raises:
            UserError: as `Store` does, or if the autoencoder was trained with another tokenizer.
        """
        self.k, self.latent = autoencoder.k, autoencoder.config.latent
        self._autoencoder = autoencoder
        self._encoder = encoder or cache(partial(FoldedEncoder, autoencoder))
        super().__init__(folder, split, verify, share)
        require_tokenizer(autoencoder, self.tokenizer_hash, self.folder)

    @property
    def columns(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """The type and the shape of one row, for each column."""
        tokens = self.shard(0).columns["tokens"].dtype
        latents = {name: (np.dtype(np.float16), (self.latent,)) for name in ("mean", "log_std")}
        return {"tokens": (tokens, (self.k,)), **latents}

    @property
    def identity(self) -> str:
        """The identity of the chunk store made from the same tokens by the same autoencoder."""
        return source_hash(source_of_chunks(self.tokenizer_hash, self.content_hash, self._autoencoder, self.packing))

    @property
    def common_properties(self) -> dict[str, Any]:
        """What blended stores must have in common."""
        return {**super().common_properties, "autoencoder": self._autoencoder.content_hash}

    def __len__(self) -> int:
        return -(-super().__len__() // self.k)

    def fill(self, start: int, out: Mapping[str, np.ndarray]) -> None:
        """Copy rows from `start` on into the arrays `[count, ...]` of the wanted columns."""
        tokens = self._chunks(start, len(next(iter(out.values()))))
        columns = {"tokens": tokens}
        if out.keys() - columns.keys():
            columns |= zip(("mean", "log_std"), encoded(self._encoder(), tokens), strict=True)
        for name, target in out.items():
            target[:] = columns[name]

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Chunks `[..., K]` on the autoencoder's device -> their columns mean and log_std there, `[..., l]` float16.

        What is beyond the range of float16 becomes infinite.
        """
        blocks = tokens.reshape(-1, self.k).split(ENCODED_AT_ONCE)
        columns = zip(*(self._encoder().encode(block) for block in blocks), strict=True)
        mean, log_std = (torch.cat(column).half().view(*tokens.shape[:-1], self.latent) for column in columns)
        return mean, log_std

    def document_ids(self, start: int, count: int) -> np.ndarray:
        """The documents that rows [start, start + count) begin in: int64 `[count]`, unique within the split."""
        first, last = self._tokens_of(start, count)
        return super().document_ids(first, last - first)[:: self.k]

    def token_counts(self, limit: int = 1 << 26, share: slice = ALL) -> np.ndarray:
        """How often each token id occurs in the first `limit` rows, as `Store` has it: int64 `[V]`."""
        return super().token_counts(limit * self.k, share)

    def _chunks(self, start: int, count: int) -> np.ndarray:
        """The rows [start, start + count), `[count, K]`; pad fills the last one of the split."""
        chunks = np.full((count, self.k), self.manifest["pad"], self.shard(0).columns["tokens"].dtype)
        first, last = self._tokens_of(start, count)
        super().fill(first, {"tokens": chunks.reshape(-1)[: last - first]})
        return chunks

    def _tokens_of(self, start: int, count: int) -> tuple[int, int]:
        """The first token of the rows [start, start + count), and the first token after them."""
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"rows {start} to {start + count} of {self.folder}, which has {len(self)}")
        return start * self.k, min((start + count) * self.k, super().__len__())
