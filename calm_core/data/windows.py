"""Windows: the pieces of a store that are the samples of a training run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from calm_core.data.store import Store
from calm_core.errors import UserError


@dataclass(frozen=True)
class Windows:
    """The windows of S positions in a split: window w is the rows from w·S to w·S + S inclusive.

    Row i of a window is an input and row i + 1 its target; a window's last row is the next one's first, so that every
    row but the first is a target exactly once. The rows are chunks of a chunk store or tokens of a token store.
    """

    store: Store
    positions: int

    def __post_init__(self) -> None:
        if not len(self):
            raise UserError(
                f"The {self.store.split} split of {self.store.folder} has {len(self.store)} {self.store.kind}, fewer "
                f"than one window of {self.positions} positions: choose a shorter window or a larger corpus."
            )

    def __len__(self) -> int:
        return max(0, len(self.store) - 1) // self.positions

    def batch(self, windows: np.ndarray, columns: Iterable[str]) -> dict[str, np.ndarray]:
        """The columns of the windows `[B]`: arrays `[B, S + 1, ...]`, tokens as int64 and the rest as stored."""
        out = empty_batch(self.store, len(windows), self.positions, columns)
        for sample, window in enumerate(windows):
            self.fill(int(window), {name: array[sample] for name, array in out.items()})
        return out

    def fill(self, window: int, out: Mapping[str, np.ndarray]) -> None:
        """Copy the rows of a window into the arrays `[S + 1, ...]`, one for each column wanted."""
        self.store.fill(window * self.positions, out)

    def document_ids(self, windows: np.ndarray) -> np.ndarray:
        """The documents that the rows of the windows `[B]` begin in: int64 `[B, S + 1]`, unique within the split."""
        return np.stack(
            [self.store.document_ids(int(window) * self.positions, self.positions + 1) for window in windows]
        )

    def documents(self, window: int) -> list[str]:
        """The names of the documents in a window, in their order."""
        ids = dict.fromkeys(self.document_ids(np.array([window]))[0].tolist())
        return [self.store.document_name(document_id) for document_id in ids]


def empty_batch(store: Store, samples: int, positions: int, columns: Iterable[str]) -> dict[str, np.ndarray]:
    """Arrays `[samples, positions + 1, ...]` for the columns of a store, not filled.

    Token ids are widened as they are copied: embeddings and losses take int64.
    """
    types = {name: store.columns[name] for name in columns}
    return {
        name: np.empty((samples, positions + 1, *shape), np.int64 if np.issubdtype(dtype, np.integer) else dtype)
        for name, (dtype, shape) in types.items()
    }
