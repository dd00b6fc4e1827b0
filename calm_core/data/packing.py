"""How documents become chunks of K tokens.

`pack`: they run on, from shard to shard too, so that chunk c of a split holds its tokens from c·K on, whatever the
shards, and pad fills the last one. `align`: each begins a chunk, and pad fills its last.
"""

from typing import Literal

import numpy as np

Packing = Literal["pack", "align"]


def chunk_offsets(offsets: np.ndarray, k: int, packing: Packing) -> np.ndarray:
    """The first chunk that begins in each document, and the number of chunks: `[documents + 1]`, like `offsets`.

    A packed document may be too short for a chunk of its own: the next document has the same first chunk then.
    """
    if packing == "pack":
        return -(-offsets // k)
    return np.append(0, np.cumsum(-(-np.diff(offsets) // k)))


def chunked(tokens: np.ndarray, offsets: np.ndarray, k: int, pad: int, packing: Packing) -> np.ndarray:
    """The tokens `[n]` of documents that begin at `offsets` as chunks `[chunks, K]`, filled up with `pad`."""
    starts = chunk_offsets(offsets, k, packing)
    chunks = np.full((starts[-1], k), pad, tokens.dtype)
    if packing == "pack":
        chunks.reshape(-1)[: len(tokens)] = tokens
    else:
        shift = np.repeat(starts[:-1] * k - offsets[:-1], np.diff(offsets))
        chunks.reshape(-1)[np.arange(len(tokens)) + shift] = tokens
    return chunks


def tokens_before(chunk: int, offsets: np.ndarray, k: int, packing: Packing) -> int:
    """How many tokens of the shard are in the chunks before this one, padding not counted."""
    if packing == "pack":
        return min(chunk * k, int(offsets[-1]))
    starts = chunk_offsets(offsets, k, packing)
    document = min(int(np.searchsorted(starts, chunk, side="right")) - 1, len(starts) - 2)
    return int(min(offsets[document] + (chunk - starts[document]) * k, offsets[document + 1]))
