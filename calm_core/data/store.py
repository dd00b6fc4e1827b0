"""Stores: Arrow shards whose columns are memory-mapped arrays, and a split of them as one axis of rows."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from calm_core.config.data_config import Packing, Verify
from calm_core.errors import UserError
from calm_core.io import hash_file, may_pass, read_manifest, replacing, source_hash, store_hash

AUTO_FULL_BYTES = 4 << 30  # a store up to this size is read whole each time it is opened

ALL = slice(None)

OPEN_SHARDS = 4096  # a process may map 65,530 files (vm.max_map_count); a large corpus, or a blend, has more shards


def write_shard(path: Path, columns: Mapping[str, pa.Array], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Write the columns as one Arrow file, atomically; returns its manifest entry (file, bytes, checksum)."""
    schema = pa.schema(
        [pa.field(name, column.type, nullable=False) for name, column in columns.items()], metadata=dict(metadata)
    )
    batch = pa.record_batch(list(columns.values()), schema=schema)
    with replacing(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(batch)
        entry = {"file": path.name, "bytes": temporary.stat().st_size, "checksum": hash_file(temporary)}
    return entry


def read_shard(path: Path) -> pa.RecordBatch:
    """The record batch of a shard, memory-mapped: data is read when it is accessed.

    Raises:
        UserError: if the file is missing or not an Arrow file.
    """
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).get_batch(0)
    except (pa.ArrowInvalid, OSError) as error:
        if may_pass(error):
            raise
        raise UserError(f"The shard {path} cannot be read ({error}): make its store again.") from error


def verify_shards(
    folder: Path, entries: Iterable[Mapping[str, Any]], verify: Verify = "auto", share: slice = ALL
) -> None:
    """Compare the files of a store with the entries of its manifest, or of these those that are this rank's `share`.

    `size` compares lengths, `full` also checksums; `auto` is `full` for a small store and `size` for a large one.

    Raises:
        UserError: naming the first file that is missing, truncated or changed.
    """
    whole = list(entries)
    entries = whole[share]
    for entry in entries:
        path = folder / entry["file"]
        size = _size(path)
        if size is None:
            raise UserError(f"The shard {path} is missing: make its store again.")
        if size != entry["bytes"]:
            raise UserError(f"The shard {path} has {size} bytes instead of {entry['bytes']}: make its store again.")
    if verify == "full" or (verify == "auto" and sum(entry["bytes"] for entry in whole) <= AUTO_FULL_BYTES):
        for entry in entries:
            if hash_file(folder / entry["file"]) != entry["checksum"]:
                raise UserError(
                    f"The shard {folder / entry['file']} has changed since it was written (its checksum differs): "
                    "make its store again."
                )


def _size(path: Path) -> int | None:
    """Bytes of a file, None if it is missing; one call."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def files_of(shards: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """The manifest entries of all files of the shards, including sidecars."""
    for shard in shards:
        yield shard
        if "sidecar" in shard:
            yield shard["sidecar"]


def list_column(rows: np.ndarray) -> pa.FixedSizeListArray:
    """The rows of `[rows, width]` as a fixed-size list column, without a copy where they are contiguous."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).reshape(-1)), rows.shape[1])


def values_of(array: pa.Array) -> np.ndarray:
    """The values of an array without nulls, a view of the shard; `to_numpy` would import pandas."""
    return np.from_dlpack(array)


def rows_of(column: pa.FixedSizeListArray) -> np.ndarray:
    """A fixed-size list column as an array `[rows, width]`, a view of the shard."""
    return values_of(column.flatten()).reshape(len(column), column.type.list_size)


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest stored type of token ids: uint16 up to 65,536 of them, int32 beyond."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


@dataclass(frozen=True)
class ShardView:
    """One open shard; its columns are views of the memory-mapped file."""

    columns: Mapping[str, np.ndarray]
    """Arrays over the rows of the flat axis: `[rows]` or `[rows, width]`."""
    open_documents: Callable[[], tuple[pa.StringArray, np.ndarray]]
    """What reads `names` and `offsets`, which training does not need."""

    @cached_property
    def _documents(self) -> tuple[pa.StringArray, np.ndarray]:
        return self.open_documents()

    @property
    def names(self) -> pa.StringArray:
        """The documents' names."""
        return self._documents[0]

    @property
    def offsets(self) -> np.ndarray:
        """`[documents + 1]`: the first row that begins in each document, and the number of rows."""
        return self._documents[1]

    def document_of(self, rows: np.ndarray) -> np.ndarray:
        """The indices in `names` of the documents that these rows of the shard begin in."""
        return np.searchsorted(self.offsets, rows, side="right") - 1


class Store:
    """One split of a store on disk; `len` is its number of rows. Shards are opened when first needed."""

    kind: ClassVar[str]
    unit: ClassVar[str]
    """The manifest's count of rows: `tokens` or `rows`."""
    k: int
    """Tokens per row."""
    latent: int
    """Dimensions of the latent of a row, 0 if there is none."""
    packing: Packing = "pack"
    """How documents are placed in the rows."""

    def __init__(self, folder: Path | str, split: str, verify: Verify = "auto", share: slice = ALL):
        """Open one split, `train` or `held_out`, and verify its shards, or this rank's `share` of them.

        Raises:
            UserError: if the store is missing or of another kind, has no such split, or a shard is damaged (named).
        """
        self.folder = Path(folder)
        self.split = split
        self.manifest = read_manifest(self.folder, self.kind)
        if split not in self.manifest["splits"]:
            raise UserError(
                f"{self.folder} holds no {split} documents, only {', '.join(self.manifest['splits'])}: "
                "change data.held_out and make it again."
            )
        self.shards: list[dict[str, Any]] = self.manifest["splits"][split]["shards"]
        verify_shards(self.folder, files_of(self.shards), verify, share)
        self._starts = [0, *accumulate(shard[self.unit] for shard in self.shards)]
        # A shard counts the documents that begin in it; its first document may have begun in the shard before.
        begun = [0, *accumulate(shard["documents"] for shard in self.shards)]
        continued = [*(int(shard.get("continues", False)) for shard in self.shards), 0]
        self._first_documents = [before - continues for before, continues in zip(begun, continued, strict=True)]
        self.shard = lru_cache(maxsize=OPEN_SHARDS)(self._open_checked)

    def __len__(self) -> int:
        return self._starts[-1]

    def rows_of(self, index: int) -> tuple[int, int]:
        """The first row of a shard, and the first row after it."""
        return self._starts[index], self._starts[index + 1]

    @property
    def content_hash(self) -> str:
        """The content hash of the whole store."""
        return store_hash(self.folder)

    @property
    def vocab_size(self) -> int:
        """V of the tokenizer that made the tokens."""
        return self.manifest["vocab_size"]

    @property
    def tokenizer_hash(self) -> str:
        """The content hash of the tokenizer that made the tokens."""
        return self.manifest["made_from"]["tokenizer"]

    @property
    def identity(self) -> str:
        """A hash of what the rows are, which a resumed run compares."""
        return self.content_hash

    @property
    def padding(self) -> int | None:
        """The token that fills the last row of a document; None if documents follow each other without a gap."""
        return self.manifest["pad"] if self.packing == "align" else None

    @property
    def common_properties(self) -> dict[str, Any]:
        """What blended stores must have in common."""
        return {"tokenizer": self.tokenizer_hash, "number of tokens per row": self.k}

    @property
    def document_count(self) -> int:
        """The number of documents in the split."""
        return self._first_documents[-1]

    @property
    def read_columns(self) -> Sequence[str]:
        """The columns that are on disk."""
        return list(self.columns)

    @property
    def columns(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """The type and the shape of one row, for each column."""
        return {name: (column.dtype, column.shape[1:]) for name, column in self.shard(0).columns.items()}

    def read(self, start: int, count: int, columns: Iterable[str]) -> dict[str, np.ndarray]:
        """The rows [start, start + count) of the columns: arrays `[count, ...]` of the stored type."""
        types = self.columns
        out = {name: np.empty((count, *types[name][1]), types[name][0]) for name in columns}
        self.fill(start, out)
        return out

    def fill(self, start: int, out: Mapping[str, np.ndarray]) -> None:
        """Copy rows from `start` on into the arrays `[count, ...]`, one for each column wanted, cast to their types."""
        count = len(next(iter(out.values())))
        for done, index, row, taken in self._spans(start, count):
            columns = self.shard(index).columns
            for name, target in out.items():
                target[done : done + taken] = columns[name][row : row + taken]

    def document_ids(self, start: int, count: int) -> np.ndarray:
        """The documents that rows [start, start + count) begin in: int64 `[count]`, unique within the split."""
        ids = np.empty(count, np.int64)
        for done, index, row, taken in self._spans(start, count):
            local = self.shard(index).document_of(np.arange(row, row + taken))
            ids[done : done + taken] = self._first_documents[index] + local
        return ids

    def document_name(self, document_id: int) -> str:
        """The name of a document of the split."""
        index = bisect_right(self._first_documents, document_id) - 1
        return self.shard(index).names[int(document_id) - self._first_documents[index]].as_py()

    def document(self, row: int) -> str:
        """The name of the document that a row begins in."""
        return self.document_name(int(self.document_ids(row, 1)[0]))

    def token_counts(self, limit: int = 1 << 26, share: slice = ALL) -> np.ndarray:
        """How often each token id occurs in the first `limit` rows, without padding: int64 `[V]`.

        Of the shards that hold these rows only this rank's `share` is read.
        """
        counts = np.zeros(self.vocab_size, np.int64)
        for _, index, _, taken in list(self._spans(0, min(limit, self._starts[-1])))[share]:
            tokens = self.shard(index).columns["tokens"][:taken]
            counts += np.bincount(tokens.reshape(-1), minlength=self.vocab_size)
        if self.padding is not None:
            counts[self.padding] = 0
        return counts

    def _spans(self, start: int, count: int) -> Iterable[tuple[int, int, int, int]]:
        """The runs of rows within one shard: (rows before it, shard, first row in the shard, rows)."""
        if start < 0 or count < 0 or start + count > self._starts[-1]:
            raise IndexError(f"rows {start} to {start + count} of {self.folder}, which has {self._starts[-1]}")
        done = 0
        while done < count:
            index = bisect_right(self._starts, start + done) - 1
            row = start + done - self._starts[index]
            taken = min(count - done, self._starts[index + 1] - start - done)
            yield done, index, row, taken
            done += taken

    def _open_checked(self, index: int) -> ShardView:
        view = self._open(index)
        found, wanted = len(view.columns["tokens"]), self.shards[index][self.unit]
        if found != wanted:
            raise UserError(
                f"The shard {self.folder / self.shards[index]['file']} has {found:,} {self.unit}, but its manifest "
                f"says {wanted:,}: make its store again."
            )
        return view

    def _open(self, index: int) -> ShardView:
        raise NotImplementedError


class TokenStore(Store):
    """One split of a token store: a row is a token. Column `tokens` `[rows]`, uint16 or int32."""

    kind = "tokens"
    unit = "tokens"
    k = 1
    latent = 0

    def _open(self, index: int) -> ShardView:
        batch = read_shard(self.folder / self.shards[index]["file"])
        tokens = batch.column("tokens")
        # The list's own values and offsets: the shard is whole, so its column starts at offset 0.
        return ShardView(
            columns={"tokens": values_of(tokens.values)},
            open_documents=lambda: (batch.column("document"), values_of(tokens.offsets)),
        )


class ChunkStore(Store):
    """One split of a chunk store: a row is a chunk.

    Columns `tokens` `[rows, K]` (uint16 or int32), `mean` and `log_std` `[rows, l]` (float16).
    """

    kind = "chunks"
    unit = "rows"

    @property
    def k(self) -> int:
        """K, tokens per chunk."""
        return self.manifest["k"]

    @property
    def packing(self) -> Packing:
        """`pack`: documents follow each other without a gap; `align`: each begins a chunk."""
        return self.manifest.get("packing", "pack")

    @property
    def latent(self) -> int:
        """l, the dimensions of a latent."""
        return self.manifest["latent"]

    @property
    def autoencoder_hash(self) -> str:
        """The content hash of the autoencoder that made the latents."""
        return self.manifest["made_from"]["autoencoder"]

    @property
    def identity(self) -> str:
        """The hash of what the rows were made from: encoded again, on any machine, they are equal up to rounding."""
        return source_hash(self.manifest["made_from"])

    @property
    def common_properties(self) -> dict[str, Any]:
        """What blended stores must have in common."""
        return {**super().common_properties, "packing": self.packing, "autoencoder": self.autoencoder_hash}

    def require(self, k: int, autoencoder_hash: str) -> None:
        """Refuse the store if it was not made for chunks of `k` tokens by this autoencoder.

        Raises:
            UserError: naming what differs.
        """
        if k != self.k:
            raise UserError(f"data.k={k}, but the chunks in {self.folder} are of {self.k} tokens: set data.k={self.k}.")
        if autoencoder_hash != self.autoencoder_hash:
            raise UserError(
                f"The latents in {self.folder} were made by the autoencoder {self.autoencoder_hash}, not by "
                f"{autoencoder_hash}: set data.autoencoder to that one, or make the chunks again."
            )

    def _open(self, index: int) -> ShardView:
        def documents() -> tuple[pa.StringArray, np.ndarray]:
            sidecar = read_shard(self.folder / self.shards[index]["sidecar"]["file"])
            return sidecar.column("document"), np.append(0, np.cumsum(values_of(sidecar.column("chunks"))))

        batch = read_shard(self.folder / self.shards[index]["file"])
        names = [name for name in batch.schema.names if name != "document"]
        return ShardView({name: rows_of(batch.column(name)) for name in names}, documents)
