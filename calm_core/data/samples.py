"""The samples of a run: windows of one or several stores, by the samples' global indices."""

from collections.abc import Iterable

import numpy as np

from calm_core.data.apportion import BlendOrder
from calm_core.data.blend import Blend, weights_of
from calm_core.data.order import SampleOrder
from calm_core.data.windows import Windows, empty_batch
from calm_core.errors import UserError


class Samples:
    """The windows of S positions of a blend, in an order that follows from the seed alone.

    Each store gives its share of the samples; each pass over a store takes its windows in another order.
    """

    def __init__(self, blend: Blend, positions: int, seed: int) -> None:
        """With windows of `positions` rows and one.

        Raises:
            UserError: if a store has no window, or its budget is none.
        """
        self.store, self.positions = blend.first, positions
        self.windows = [Windows(store, positions) for store in blend.stores]
        limits = [
            share.limit(len(windows), positions * self.store.k)
            for windows, share in zip(self.windows, blend.shares, strict=True)
        ]
        for windows, limit in zip(self.windows, limits, strict=True):
            if limit == 0:
                raise UserError(
                    f"The budget of {windows.store.folder} is less than one sample: raise it in data.blend."
                )
        self._turns = BlendOrder(weights_of(blend.shares), limits)
        self._orders = [SampleOrder(len(windows), seed + number) for number, windows in enumerate(self.windows)]

    def require(self, samples: int) -> None:
        """Refuse a run of more samples than the stores give.

        Raises:
            UserError: saying how many they give.
        """
        self._turns.place(np.array([samples - 1]))

    def places(self, samples: np.ndarray) -> list[tuple[Windows, int]]:
        """The store's windows that each sample `[B]` is of, and which of them it is."""
        stores, numbers = self._turns.place(np.asarray(samples, np.int64))
        chosen = np.empty_like(numbers)
        for store in np.unique(stores):
            chosen[stores == store] = self._orders[store].window(numbers[stores == store])
        return [(self.windows[store], int(window)) for store, window in zip(stores, chosen, strict=True)]

    def batch(self, samples: np.ndarray, columns: Iterable[str]) -> dict[str, np.ndarray]:
        """The columns of the samples `[B]`: arrays `[B, S + 1, ...]`, tokens as int64 and the rest as stored."""
        out = empty_batch(self.store, len(samples), self.positions, columns)
        for sample, (windows, window) in enumerate(self.places(samples)):
            windows.fill(window, {name: array[sample] for name, array in out.items()})
        return out

    def documents(self, samples: np.ndarray) -> list[str]:
        """The names of the documents behind the samples `[B]`, each once."""
        return list(
            dict.fromkeys(name for windows, window in self.places(samples) for name in windows.documents(window))
        )
