"""Micro-batches of chunk windows."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calm_core.data.samples import Samples
from calm_core.data.store import Store
from calm_core.data.windows import Windows
from calm_core.model.heads.protocol import Target


@dataclass(frozen=True)
class ChunkBatch:
    """A micro-batch of windows; a pipeline stage has the columns it works on (see `needed_columns`).

    Attributes:
        samples: global index of each sample `[B]`; its noise follows from it.
        tokens: `[B, S + 1, K]` int64; position p reads chunk p and predicts chunk p + 1.
        mean: posterior mean of the same chunks `[B, S + 1, l]`, None where there are tokens only.
        log_std: logarithm of its standard deviation, likewise.
    """

    samples: np.ndarray
    tokens: Tensor | None = None
    mean: Tensor | None = None
    log_std: Tensor | None = None

    def inputs(self, device: torch.device) -> Tensor:
        """`[B, S, K]`: every chunk but the last."""
        return self.tokens[:, :-1].to(device, non_blocking=True)

    def target(self, device: torch.device) -> Target:
        """Every chunk but the first, positions leading: `[S, B, ...]`."""
        latents = (self.mean, self.log_std) if self.mean is not None else ()
        tokens, *latents = (x[:, 1:].transpose(0, 1).to(device, non_blocking=True) for x in (self.tokens, *latents))
        return Target(tokens, *(x.float() for x in latents))


def needed_columns(store: Store, *, first: bool, last: bool) -> list[str]:
    """What a pipeline stage reads of a store: the first its inputs, the last the targets, those between nothing."""
    if last:
        return list(store.columns)
    return ["tokens"] if first else []


def read_batch(
    windows: Windows | Samples, chosen: np.ndarray, samples: np.ndarray, columns: Iterable[str] | None = None
) -> ChunkBatch:
    """The `chosen` ones `[B]` as the samples with these global indices; a token store's row is a chunk of one token.

    `columns` are those of the store that are read; None means all.
    """
    names = list(windows.store.columns) if columns is None else list(columns)
    if not names:
        return ChunkBatch(samples)
    arrays = {name: torch.from_numpy(array) for name, array in windows.batch(chosen, names).items()}
    tokens = arrays.pop("tokens").view(len(chosen), windows.positions + 1, windows.store.k)
    return ChunkBatch(samples, tokens, **arrays)
