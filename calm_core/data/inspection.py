"""A look inside chunk stores: statistics, and text beside what the autoencoder makes of it."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from calm_core.data.store import ChunkStore

SAMPLED = 1 << 16  # rows that the statistics are taken from
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


def statistics(store: ChunkStore) -> dict[str, Any]:
    """What the first rows of a split hold: lists are the least value, tenth, half, nine tenths and the greatest.

    Keys: `document_chunks`, the lengths of documents; `tokens_used` of V, `pad_share`; `mean` over all dimensions with
    `mean_std` and the greatest `mean_abs`; `sigma`, the posterior's standard deviations; `flat_dimensions`, those of
    the latent whose mean varies less than a tenth of its sigma.
    """
    rows = store.read(0, min(SAMPLED, len(store)), ("tokens", "mean", "log_std"))
    mean, sigma = rows["mean"].astype(np.float32), np.exp(rows["log_std"].astype(np.float32))
    lengths = np.bincount(store.document_ids(0, len(mean)))
    whole = lengths if len(mean) == len(store) else lengths[:-1]  # the last document may go on beyond the sample
    return {
        "rows": len(mean),
        "document_chunks": np.quantile(whole if len(whole) else lengths, QUANTILES),
        "tokens_used": len(np.unique(rows["tokens"])),
        "pad_share": np.mean(rows["tokens"] == store.manifest["pad"]),
        "mean": mean.mean(),
        "mean_std": mean.std(),
        "mean_abs": np.abs(mean).max(),
        "sigma": np.quantile(sigma, QUANTILES),
        "flat_dimensions": int(np.sum(mean.std(0) < 0.1 * sigma.mean(0))),
    }


def side_by_side(left: list[str], right: list[str], width: int) -> Iterator[str]:
    """Pieces of text and what was made of them, in two columns of `width` together; `|` stands where they differ."""
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
