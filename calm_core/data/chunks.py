"""Chunks: K tokens and their latents in float16, made from token shards by a frozen autoencoder.

They are stored by a build (`ChunkStoreBuild`), or computed whenever they are read (`EncodedStore`).

With packing `pack` documents follow each other without a gap, across shards too: chunk c of a split holds its tokens
from c·K on, and pad fills the last chunk of the split. With `align` each document begins a chunk, and pad fills its
last one.

Tokens are the same on every machine. Latents are rounded as the processor's kernels round: machines with other vector
instructions (AVX2, AVX-512, a GPU) write float16 values that may differ in the last bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, FoldedEncoder
from calm_core.config.data_config import Packing, Verify
from calm_core.data.builder import WHOLE_TASK, ArrayTask, StoreBuilder, carry_out, shard_name
from calm_core.data.store import ALL, TokenStore, list_column, write_shard
from calm_core.errors import UserError
from calm_core.io import format_version, read_manifest, source_hash, store_hash
from calm_core.progress import Progress

SHARD_ROWS = 1 << 20  # chunks in a shard at most: it is held in memory while it is written, 0.55 GB at l=128

ENCODED_AT_ONCE = 1 << 12  # chunks: few enough for their activations to stay in cache

FLOAT16_MAX = float(np.finfo(np.float16).max)


def chunk_offsets(offsets: np.ndarray, k: int, packing: Packing) -> np.ndarray:
    """The first chunk that begins in each document, and the number of chunks: `[documents + 1]`, like `offsets`.

    A packed document may be too short to begin a chunk: it then has the same first chunk as the next document.
    """
    if packing == "pack":
        return -(-offsets // k)
    return np.append(0, np.cumsum(-(-np.diff(offsets) // k)))


def chunked(tokens: np.ndarray, offsets: np.ndarray, k: int, pad: int, packing: Packing) -> np.ndarray:
    """The tokens `[n]` of documents that begin at `offsets`, as chunks `[chunks, K]` filled up with `pad`."""
    starts = chunk_offsets(offsets, k, packing)
    chunks = np.full((starts[-1], k), pad, tokens.dtype)
    if packing == "pack":
        chunks.reshape(-1)[: len(tokens)] = tokens
    else:
        shift = np.repeat(starts[:-1] * k - offsets[:-1], np.diff(offsets))
        chunks.reshape(-1)[np.arange(len(tokens)) + shift] = tokens
    return chunks


def tokens_before(chunk: int, offsets: np.ndarray, k: int, packing: Packing) -> int:
    """How many tokens of the shard are in the chunks before this one, without padding."""
    if packing == "pack":
        return min(chunk * k, int(offsets[-1]))
    starts = chunk_offsets(offsets, k, packing)
    document = min(int(np.searchsorted(starts, chunk, side="right")) - 1, len(starts) - 2)
    return int(min(offsets[document] + (chunk - starts[document]) * k, offsets[document + 1]))


def text_tokens(tokens: Tensor, pad: int | None) -> Tensor:
    """Which tokens of the chunks `[..., K]` are text: all but the trailing `pad` of a chunk; all if `pad` is None."""
    if pad is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    return (tokens != pad).flip(-1).cumsum(-1).flip(-1) > 0


def encoded(
    encoder: FoldedEncoder, chunks: np.ndarray, advance: Callable[[int], object] = lambda count: None
) -> tuple[np.ndarray, np.ndarray]:
    """The posteriors of the chunks `[n, K]`: mean and log_std, `[n, l]` float16.

    `advance` is called with each number of chunks done.

    Raises:
        UserError: if a value is beyond the range of float16.
    """
    mean, log_std = (np.empty((len(chunks), encoder.latent), np.float16) for _ in range(2))
    for begin in range(0, len(chunks), ENCODED_AT_ONCE):
        batch = slice(begin, begin + ENCODED_AT_ONCE)
        tokens = torch.from_numpy(chunks[batch].astype(np.int64)).to(encoder.device)
        for name, values, out in zip(("mean", "log_std"), encoder.encode(tokens), (mean, log_std), strict=True):
            largest = values.abs().max().item()
            if not largest <= FLOAT16_MAX:  # not-a-number included
                raise UserError(
                    f"A latent's {name} is {largest:g}, beyond float16's {FLOAT16_MAX:g}: train the autoencoder again."
                )
            out[batch] = values.cpu().numpy()
        advance(len(tokens))
    return mean, log_std


@dataclass(frozen=True)
class ChunkStoreBuild:
    """The building of a chunk store: a token store encoded by a frozen autoencoder, on the autoencoder's device.

    The inputs are the token shards: the chunks that begin in one, as `packing` says, fill as many chunk shards as they
    need. Several machines may each do some of the inputs.
    """

    autoencoder: Autoencoder
    packing: Packing
    builder: StoreBuilder
    inputs: list[tuple[TokenStore, int]]
    """A split of the token store, and the number of the shard in it."""

    @classmethod
    def begin(
        cls,
        tokens: Path,
        autoencoder: Autoencoder,
        folder: Path,
        verify: Verify = "auto",
        packing: Packing = "pack",
    ) -> "ChunkStoreBuild":
        """Start the chunk store of a token store, or continue it; nothing is written yet.

        Raises:
            UserError: if the autoencoder was trained with another tokenizer, a token shard is damaged, or the folder
                holds something else.
        """
        manifest = read_manifest(tokens, "tokens")
        tokenizer_hash = manifest["made_from"]["tokenizer"]
        require_tokenizer(autoencoder, tokenizer_hash, tokens)
        made_from = source_of_chunks(tokenizer_hash, store_hash(tokens), autoencoder, packing)
        stores = [TokenStore(tokens, split, verify) for split in manifest["splits"]]
        inputs = [(store, index) for store in stores for index in range(len(store.shards))]
        names = [store.shards[index]["file"] for store, index in inputs]
        shape = {"k": autoencoder.k, "latent": autoencoder.config.latent, "packing": packing}
        special = {name: manifest[name] for name in ("vocab_size", "pad", "bos", "eos")}
        return cls(autoencoder, packing, StoreBuilder(folder, "chunks", made_from, names, **shape, **special), inputs)

    def run(self, task: ArrayTask = WHOLE_TASK) -> None:
        """Encode the token shards of a task that are not done yet.

        Raises:
            UserError: if a latent is beyond the range of float16.
        """
        todo = [number for number in task.of(range(len(self.inputs))) if not self.builder.is_done(number)]
        encoder = FoldedEncoder(self.autoencoder)
        self.builder.begin()
        with Progress("encoding", sum(self._rows(number) for number in todo), "chunks") as progress:
            for number in todo:
                self._encode_input(number, encoder, progress)

    def finish(self) -> dict[str, Any]:
        """Complete the store and return its manifest.

        Raises:
            UserError: naming inputs that are not done.
        """
        return self.builder.finish()

    def _rows(self, number: int) -> int:
        store, index = self.inputs[number]
        if self.packing == "align":
            return int(chunk_offsets(store.shard(index).offsets, self.autoencoder.k, self.packing)[-1])
        before, after = (-(-row // self.autoencoder.k) for row in store.rows_of(index))
        return after - before

    def _text(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of the chunks of an input, and the offsets of its documents in them, with the end.

        Packed documents continue across shards: the first tokens of a shard may belong to a chunk of the shard before,
        and its last chunk may end in the shards that follow.
        """
        store, index = self.inputs[number]
        shard = store.shard(index)
        if self.packing == "align":
            return shard.columns["tokens"], shard.offsets
        k, (begin, end) = self.autoencoder.k, store.rows_of(index)
        first, last = (min(-(-row // k) * k, len(store)) for row in (begin, end))
        tokens = store.read(first, last - first, ("tokens",))["tokens"]
        offsets = np.maximum(shard.offsets - (first - begin), 0)
        offsets[-1] = len(tokens)
        return tokens, offsets

    def _encode_input(self, number: int, encoder: FoldedEncoder, progress: Progress) -> None:
        store, index = self.inputs[number]
        names, k = store.shard(index).names, self.autoencoder.k
        tokens, offsets = self._text(number)
        chunks = chunked(tokens, offsets, k, self.builder.header["pad"], self.packing)
        starts = chunk_offsets(offsets, k, self.packing)
        begins = range(0, max(len(chunks), 1), SHARD_ROWS)  # no chunk begins in a shard of a few tokens
        for block, begin in enumerate(begins):
            if not self.builder.has(number, block):
                rows = range(begin, min(begin + SHARD_ROWS, len(chunks)))
                mean, log_std = encoded(encoder, chunks[rows.start : rows.stop], progress.advance)
                columns = {
                    "tokens": list_column(chunks[rows.start : rows.stop]),
                    "mean": list_column(mean),
                    "log_std": list_column(log_std),
                }
                path = self.builder.folder / shard_name(store.split, index, block)
                metadata = {name: str(value) for name, value in self.builder.header["made_from"].items()}
                entry = _write(path, columns, names, starts, rows, metadata)
                first, end = (tokens_before(row, offsets, k, self.packing) for row in (rows.start, rows.stop))
                entry["tokens"] = end - first
                self.builder.add(number, block, block == len(begins) - 1, {store.split: entry})


def build_chunks(
    tokens: Path, autoencoder: Autoencoder, folder: Path, verify: Verify = "auto", packing: Packing = "pack"
) -> dict[str, Any]:
    """Encode a whole token store into a chunk store and return its manifest.

    A finished store is left as it is; one whose build was killed is continued, with the same result.

    Raises:
        UserError: as `ChunkStoreBuild` does.
    """
    build = ChunkStoreBuild.begin(tokens, autoencoder, folder, verify, packing)
    carry_out(build.builder, build.run, build.finish)
    return read_manifest(folder, "chunks")


def require_tokenizer(autoencoder: Autoencoder, tokenizer_hash: str, tokens: Path) -> None:
    """Refuse tokens of another tokenizer than the autoencoder was trained with.

    Raises:
        UserError: naming both.
    """
    if tokenizer_hash != autoencoder.tokenizer_hash:
        raise UserError(
            f"The autoencoder was trained with the tokenizer {autoencoder.tokenizer_hash}, but the tokens in {tokens} "
            f"are of {tokenizer_hash}: set data.autoencoder or data.tokens to one that matches the other."
        )


def source_of_chunks(tokenizer: str, tokens: str, autoencoder: Autoencoder, packing: Packing) -> dict[str, Any]:
    """What decides the chunks and latents of a token store; `tokenizer` and `tokens` are content hashes."""
    return {
        "format": format_version("chunks"),
        "tokenizer": tokenizer,
        "tokens": tokens,
        "autoencoder": autoencoder.content_hash,
        "data.k": autoencoder.k,
        "data.packing": packing,
    }


def _write(
    path: Path, columns: dict[str, pa.Array], names: pa.Array, starts: np.ndarray, rows: range, metadata: dict[str, str]
) -> dict[str, Any]:
    """Write the chunks `rows` of an input, and the sidecar with their documents; returns the manifest entry."""
    document, inside, continues = documents_of(starts, rows)
    columns["document"] = pa.array(document.astype(np.int32))
    sidecar = {
        "document": names[inside.start : inside.stop],
        "chunks": pa.array(np.bincount(document, minlength=len(inside)).astype(np.int64)),
    }
    return {
        **write_shard(path, columns, metadata),
        "rows": len(rows),
        "documents": len(inside) - continues,
        **({"continues": True} if continues else {}),
        "sidecar": write_shard(path.with_suffix(".documents.arrow"), sidecar, metadata),
    }


def documents_of(starts: np.ndarray, rows: range) -> tuple[np.ndarray, range, bool]:
    """The documents of the chunks `rows` of an input, whose documents begin with the chunks `starts`.

    A chunk belongs to the document of its first token.

    Returns:
        The document of each chunk, as an index into the second result.
        The documents of these chunks, including one that begins in the chunks before.
        Whether the first of them begins in the chunks before.
    """
    if not rows:
        return np.empty(0, np.int64), range(len(starts) - 1), False
    # With the chunks before and after: a document too short to begin a chunk goes with the chunk before it, or with
    # the first chunk of the input.
    around = np.arange(rows.start - 1, rows.stop + 1)
    before, *document, after = np.searchsorted(starts, around, side="right") - 1
    first, last = document[0] if rows.start else 0, document[-1]
    return np.array(document) - first, range(int(first), int(max(after, last + 1))), bool(before == first)


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
