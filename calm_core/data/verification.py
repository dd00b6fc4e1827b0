"""Verifying stores: every file, checksum and count against the manifest."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from calm_core.data.manifest import MANIFEST, read_json, read_manifest
from calm_core.data.shards import files_of, read_shard, verify_shards
from calm_core.errors import UserError
from calm_core.progress import Progress

KINDS = ("tokens", "chunks")


def store_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished store of tokens or chunks.

    Raises:
        UserError: if the folder holds none.
    """
    kind = read_json(folder / MANIFEST).get("kind") if (folder / MANIFEST).exists() else None
    return read_manifest(folder, kind if kind in KINDS else "tokens or chunks")


def faults(folder: Path) -> Iterator[str]:
    """What is wrong in a store, one sentence for each bad file or sum, as it is found; every byte is read.

    Raises:
        UserError: if the folder holds no finished store.
    """
    manifest = store_manifest(folder)
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    with Progress("verifying", sum(entry["bytes"] for entry in files_of(shards)), "bytes") as progress:
        for shard in shards:
            bad = []
            for entry in files_of([shard]):
                try:
                    verify_shards(folder, [entry], "full")
                except UserError as fault:
                    bad.append(str(fault))
                progress.advance(entry["bytes"])
            yield from bad or _wrong_counts(folder, shard)
    for name, split in manifest["splits"].items():
        for counted in ("rows", "tokens", "documents", "bytes"):
            if split[counted] != sum(shard[counted] for shard in split["shards"]):
                yield f"{folder / MANIFEST} sums the {counted} of {name} wrongly: make the store again."


def _wrong_counts(folder: Path, shard: Mapping[str, Any]) -> Iterator[str]:
    """Where a shard holds another number of something than its entry in the manifest says."""
    batch = read_shard(folder / shard["file"])
    found = {"rows": batch.num_rows}
    if "sidecar" in shard:
        sidecar = read_shard(folder / shard["sidecar"]["file"])
        found["documents"] = sidecar.num_rows - shard.get("continues", False)
        found["rows in its documents"] = sum(sidecar.column("chunks").to_pylist())
    else:
        found["documents"] = batch.num_rows
        found["tokens"] = len(batch.column("tokens").flatten())
    for name, count in found.items():
        wanted = shard[name.split(" ")[0]]
        if count != wanted:
            path = folder / shard["file"]
            yield f"The shard {path} has {count:,} {name} instead of {wanted:,}: make its store again."
