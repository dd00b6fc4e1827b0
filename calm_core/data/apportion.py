"""Which of several stores each sample comes from: every share kept within one sample, found without replay.

Store j is to give the share w_j of the samples. Let the numbers floor(i / w_j) to ceil((i + 1) / w_j) - 1 be the window
of its sample i: when every sample falls into its window, the store has given floor(w_j n) or ceil(w_j n) of the first
n, for every n. Such an order exists because the shares sum to one (Baruah, Cohen, Plaxton and Varvel, "Proportionate
progress", 1996), and to give each number to the open window that closes first finds it (earliest deadline first).

How far each store has come after n samples follows in closed form. Of a class of windows that is served before all
others, min over s <= n of released(s) + n - s are served by n, released(s) being those of it that open before s.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from calm_core.errors import UserError

BLOCK = 1 << 12  # samples whose stores are found at once
SCALE = 1 << 30  # shares are taken as whole numbers of about this sum: products with 2^33 samples fit int64
LEAST_SHARE = 1e-6  # of all samples: the look-back of `counts` is the reciprocal of the least share


class Apportionment:
    """Shares the samples 0, 1, 2, ... out among stores, in proportion to their weights."""

    def __init__(self, weights: Sequence[float]) -> None:
        """With one weight above zero for each store."""
        self._parts = np.array([round(weight / sum(weights) * SCALE) for weight in weights], np.int64)
        self._whole = int(self._parts.sum())

    def counts(self, n: int) -> np.ndarray:
        """How many of the first n samples each store gives, int64 `[stores]`: its share of n, rounded down or up."""
        counts, remainder = np.divmod(n * self._parts, self._whole)
        closing = -(-(counts + 1) * self._whole // self._parts)
        # Before these s no window of a later sample is open, and the minimum is the one of s = 0, which is n.
        s = np.arange(max(1, n - self._whole // int(self._parts.min()) - 1), n + 1)
        opened = -(-s * self._parts[:, None] // self._whole)
        served = n - s + np.minimum(opened, counts[:, None]).sum(0)
        done = int(counts.sum())
        # A store whose share of n is no whole number may have given one sample more: asked for in order of precedence.
        for store in sorted(np.flatnonzero(remainder), key=lambda store: (closing[store], store)):
            served += opened[store] > counts[store]
            before, done = done, min(n, int(served.min()))
            counts[store] += done - before
        return counts

    def run(self, n: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The store of each of the samples n .. n + length - 1, and its number among that store's samples."""
        parts, whole, given = self._parts.tolist(), self._whole, self.counts(n).tolist()
        opens = [i * whole // part for i, part in zip(given, parts, strict=True)]
        closes = [-(-(i + 1) * whole // part) for i, part in zip(given, parts, strict=True)]
        stores, numbers = np.empty(length, np.int64), np.empty(length, np.int64)
        for step in range(length):
            store = min((c, j) for j, (o, c) in enumerate(zip(opens, closes, strict=True)) if o <= n + step)[1]
            stores[step], numbers[step] = store, given[store]
            given[store] = i = given[store] + 1
            opens[store], closes[store] = i * whole // parts[store], -(-(i + 1) * whole // parts[store])
        return stores, numbers

    def exhausted(self, store: int, samples: int) -> int:
        """The least n of which the store gives `samples`, at least one."""
        part = int(self._parts[store])
        low, high = (samples - 1) * self._whole // part, -(-samples * self._whole // part)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.counts(middle)[store] >= samples else (middle, high)
        return high


@dataclass(frozen=True)
class _Phase:
    """A stretch of samples that the same stores share: from `first` to before `end`, None where that never comes."""

    first: int
    end: int | None
    stores: np.ndarray
    given: np.ndarray
    """Samples that each of its stores gave before it."""
    shares: Apportionment


class BlendOrder:
    """Which store each sample of a run is of, and which of that store's samples it is.

    Stores give samples in proportion to their weights, each at most its limit (None: without end). One that has given
    all leaves, and those that remain share its part in proportion to theirs.
    """

    def __init__(self, weights: Sequence[float], limits: Sequence[int | None]) -> None:
        self._phases = list(_phases(weights, limits))
        self.samples = self._phases[-1].end
        """How many samples there are until every store has left; None where that never happens."""
        self._block = lru_cache(maxsize=4)(self._find_block)

    def place(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The store of each sample `[B]`, and the sample's number among that store's: int64 `[B]` each."""
        if self.samples is not None and samples.size and samples.max() >= self.samples:
            raise UserError(
                f"The stores of data.blend give {self.samples:,} samples within their epochs and budgets, and sample "
                f"{samples.max():,} is asked for: raise those, or lower training.steps."
            )
        block, within = np.divmod(samples, BLOCK)
        stores, numbers = np.empty_like(block), np.empty_like(block)
        for index in np.unique(block):
            chosen = block == index
            found = self._block(int(index))
            stores[chosen], numbers[chosen] = (column[within[chosen]] for column in found)
        return stores, numbers

    def _find_block(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Stores and numbers of the samples from index · BLOCK on, BLOCK of them or as many as there are."""
        stores, numbers = [], []
        for phase in self._phases:
            first = max(index * BLOCK, phase.first)
            end = (index + 1) * BLOCK if phase.end is None else min((index + 1) * BLOCK, phase.end)
            if first < end:
                store, number = phase.shares.run(first - phase.first, end - first)
                stores.append(phase.stores[store])
                numbers.append(phase.given[store] + number)
        return np.concatenate(stores), np.concatenate(numbers)


def _phases(weights: Sequence[float], limits: Sequence[int | None]) -> Iterator[_Phase]:
    """The phases of a blend: each but an endless one ends when a store has given all it may."""
    given, first = np.zeros(len(weights), np.int64), 0
    stores = np.arange(len(weights))
    while len(stores):
        shares = Apportionment([weights[store] for store in stores])
        left = [None if limits[store] is None else limits[store] - int(given[store]) for store in stores]
        ends = [shares.exhausted(place, count) for place, count in enumerate(left) if count is not None]
        length = min(ends, default=None)
        yield _Phase(first, None if length is None else first + length, stores, given[stores], shares)
        if length is None:
            return
        given[stores] += shares.counts(length)
        first += length
        stores = np.array([store for store in stores if limits[store] is None or given[store] < limits[store]])
