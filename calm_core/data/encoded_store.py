"""A token store read as the chunk store that an autoencoder would make of it: latents are computed as they are read."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from calm_core.autoencoder import Autoencoder
from calm_core.data.chunks import require_tokenizer, source_of_chunks
from calm_core.data.encoding import encoded
from calm_core.data.manifest import source_hash
from calm_core.data.packing import chunk_offsets
from calm_core.data.shards import Verify
from calm_core.data.store import ShardView, TokenStore
from calm_core.folded_encoder import FoldedEncoder


class EncodedStore(TokenStore):
    """One split of a token store, its documents packed into chunks; a row is a chunk, with the columns of `ChunkStore`.

    The encoder runs where the autoencoder is when the first latent is asked for.
    """

    def __init__(
        self,
        folder: Path | str,
        split: str,
        autoencoder: Autoencoder,
        verify: Verify = "auto",
        encoder: Callable[[], FoldedEncoder] | None = None,
    ) -> None:
        """Open and verify one split. `encoder` gives the autoencoder's, for several stores to share its tables.

        Raises:
            UserError: as `Store` does, or if the autoencoder was trained with another tokenizer.
        """
        self.k, self.latent = autoencoder.k, autoencoder.config.latent
        self._autoencoder = autoencoder
        self._encoder = encoder or cache(partial(FoldedEncoder, autoencoder))
        super().__init__(folder, split, verify)
        require_tokenizer(autoencoder, self.tokenizer_hash, self.folder)

    @property
    def columns(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """The type and the shape of one row, for each column."""
        tokens = self.shard(0).columns["tokens"].dtype
        latents = {name: (np.dtype(np.float16), (self.latent,)) for name in ("mean", "log_std")}
        return {"tokens": (tokens, (self.k,)), **latents}

    @property
    def identity(self) -> str:
        """That of the chunk store made of the same tokens by the same autoencoder."""
        return source_hash(source_of_chunks(self.tokenizer_hash, self.content_hash, self._autoencoder, self.packing))

    @property
    def kinship(self) -> dict[str, Any]:
        """What stores must have in common to be blended."""
        return {**super().kinship, "autoencoder": self._autoencoder.content_hash}

    def fill(self, start: int, out: Mapping[str, np.ndarray]) -> None:
        """Copy rows from `start` on into the arrays `[count, ...]`, one for each column wanted."""
        tokens = self._chunks(start, len(next(iter(out.values()))))
        latents = dict(zip(("mean", "log_std"), encoded(self._encoder(), tokens), strict=True)) if len(out) > 1 else {}
        for name, target in out.items():
            target[:] = tokens if name == "tokens" else latents[name]

    def _chunks(self, start: int, count: int) -> np.ndarray:
        """The rows [start, start + count), `[count, K]`; pad fills the last one of a shard."""
        chunks = np.full((count, self.k), self.manifest["pad"], self.shard(0).columns["tokens"].dtype)
        for done, index, row, taken in self._spans(start, count):
            tokens = self.shard(index).columns["tokens"][row * self.k : (row + taken) * self.k]
            chunks[done : done + taken].reshape(-1)[: len(tokens)] = tokens
        return chunks

    def _rows_of(self, shard: Mapping[str, Any]) -> int:
        return -(-shard["tokens"] // self.k)

    def _open(self, index: int) -> ShardView:
        view = super()._open(index)
        return replace(view, offsets=chunk_offsets(view.offsets, self.k, self.packing))
