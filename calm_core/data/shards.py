"""Shards: Arrow IPC files of one uncompressed record batch, so that each column is one memory-mapped array."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from calm_core.data.manifest import hash_file, replacing
from calm_core.errors import UserError

Verify = Literal["auto", "full", "size"]

AUTO_FULL_BYTES = 4 << 30  # a store up to this size is worth reading whole each time it is opened


def write_shard(path: Path, columns: Mapping[str, pa.Array], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Write the columns as one Arrow file, whole or not at all; its entry in a manifest (file, bytes, checksum)."""
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
    """The record batch of a shard, memory-mapped: nothing is read until it is touched.

    Raises:
        UserError: if the file is missing or is no Arrow file.
    """
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).get_batch(0)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"The shard {path} cannot be read ({error}): make its store again.") from error


def verify_shards(folder: Path, entries: Iterable[Mapping[str, Any]], verify: Verify = "auto") -> None:
    """Compare the files of a store with the entries of its manifest.

    `size` looks at each file's length, `full` at each byte's part in the checksum; `auto` is `full` for what is small.

    Raises:
        UserError: naming the first file that is missing, truncated or changed.
    """
    entries = list(entries)
    for entry in entries:
        path = folder / entry["file"]
        size = path.stat().st_size if path.exists() else None
        if size is None:
            raise UserError(f"The shard {path} is missing: make its store again.")
        if size != entry["bytes"]:
            raise UserError(f"The shard {path} has {size} bytes instead of {entry['bytes']}: make its store again.")
    if verify == "full" or (verify == "auto" and sum(entry["bytes"] for entry in entries) <= AUTO_FULL_BYTES):
        for entry in entries:
            if hash_file(folder / entry["file"]) != entry["checksum"]:
                raise UserError(
                    f"The shard {folder / entry['file']} has changed since it was written (its checksum differs): "
                    "make its store again."
                )


def files_of(shards: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """The entries of all the files of the shards, sidecars included."""
    for shard in shards:
        yield shard
        if "sidecar" in shard:
            yield shard["sidecar"]


def list_column(rows: np.ndarray) -> pa.FixedSizeListArray:
    """The rows of `[rows, width]` as a fixed-size list column, without a copy where they are contiguous."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).reshape(-1)), rows.shape[1])


def rows_of(column: pa.FixedSizeListArray) -> np.ndarray:
    """A fixed-size list column as an array `[rows, width]`, a view of the shard."""
    return column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), column.type.list_size)


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest stored type of token ids: uint16 up to 65,536 of them, int32 beyond."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
