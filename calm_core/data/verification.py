"""Inspection of stores: checksums and counts against the manifest, statistics, and text."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calm_core.data.store import ChunkStore, files_of, read_shard, verify_shards
from calm_core.errors import UserError
from calm_core.io import MANIFEST, read_json, read_manifest
from calm_core.progress import Progress

KINDS = ("tokens", "chunks")

STATISTICS_ROWS = 1 << 16

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


def store_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished store of tokens or chunks.

    Raises:
        UserError: if the folder holds none.
    """
    kind = read_json(folder / MANIFEST).get("kind") if (folder / MANIFEST).exists() else None
    return read_manifest(folder, kind if kind in KINDS else "tokens or chunks")


def faults(folder: Path) -> Iterator[str]:
    """The faults of a store, one sentence for each bad file or sum, as they are found; every byte is read.

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
    """The counts in which a shard differs from its entry in the manifest."""
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


def statistics(store: ChunkStore) -> dict[str, Any]:
    """Statistics of the first rows of a split; lists hold the quantiles `QUANTILES`.

    Keys: `document_chunks`, the lengths of documents; `tokens_used`, the number of distinct token ids; `pad_fraction`;
    `mean` over all dimensions with `mean_std` and the maximum `mean_abs`; `sigma`, the posterior's standard deviations;
    `flat_dimensions`, the number of latent dimensions whose mean varies by less than a tenth of its sigma.
    """
    rows = store.read(0, min(STATISTICS_ROWS, len(store)), ("tokens", "mean", "log_std"))
    mean, sigma = rows["mean"].astype(np.float32), np.exp(rows["log_std"].astype(np.float32))
    lengths = np.bincount(store.document_ids(0, len(mean)))
    whole = lengths if len(mean) == len(store) else lengths[:-1]  # the last document may continue beyond these rows
    return {
        "rows": len(mean),
        "document_chunks": np.quantile(whole if len(whole) else lengths, QUANTILES),
        "tokens_used": len(np.unique(rows["tokens"])),
        "pad_fraction": np.mean(rows["tokens"] == store.manifest["pad"]),
        "mean": mean.mean(),
        "mean_std": mean.std(),
        "mean_abs": np.abs(mean).max(),
        "sigma": np.quantile(sigma, QUANTILES),
        "flat_dimensions": int(np.sum(mean.std(0) < 0.1 * sigma.mean(0))),
    }


def side_by_side(left: list[str], right: list[str], width: int) -> Iterator[str]:
    """Texts and their reconstructions in two columns, `width` characters in total; `|` marks lines that differ."""
    column = max(8, (width - 3) // 2)
    one = other = ""
    same = True
    for before, after in zip(map(_visible, left), map(_visible, right), strict=True):
        if one and max(len(one) + len(before), len(other) + len(after)) > column:
            yield f"{one:<{column}} {' ' if same else '|'} {other}"
            one, other, same = "", "", True
        one, other, same = one + before, other + after, same and before == after
    yield f"{one:<{column}} {' ' if same else '|'} {other}"


def _visible(text: str) -> str:
    """The text on one line."""
    return "".join(c if c.isprintable() else {"\n": "⏎", "\t": "→"}.get(c, "·") for c in text)
