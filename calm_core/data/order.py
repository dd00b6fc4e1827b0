"""The order of the samples: a function of the seed and of the samples consumed, not of any process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np

from calm_core.errors import UserError

ROUNDS = 8  # of the Feistel network

BLOCK = 1 << 12  # samples whose stores are computed at once

SCALE = 1 << 30  # weights become whole numbers of about this sum: their products with 2^33 samples fit int64


@dataclass(frozen=True)
class SampleOrder:
    """Which of `count` windows each sample is: each epoch visits every window once, in an order of its own."""

    count: int
    seed: int

    def window(self, sample: np.ndarray) -> np.ndarray:
        """The windows of the samples with these global indices: int64, of the shape of `sample`."""
        sample = np.asarray(sample, dtype=np.int64)
        epoch, position = np.divmod(sample, self.count)
        window = np.empty_like(position)
        for number in np.unique(epoch):
            chosen = epoch == number
            window[chosen] = permute(position[chosen], self.count, self.seed, int(number))
        return window


def permute(position: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """The image of each position in [0, count) under the permutation of this seed and epoch: int64 `[n]`.

    Memory is constant in `count`; a position takes fewer than two passes through the Feistel network on average.
    """
    bits = max(1, (count - 1).bit_length())
    keys = _round_keys(seed, epoch)
    image = _feistel(position.astype(np.uint64), bits, keys)
    # The network permutes [0, 2^bits): an image outside [0, count) follows its cycle until it is inside.
    while len(outside := np.flatnonzero(image >= count)):
        image[outside] = _feistel(image[outside], bits, keys)
    return image.astype(np.int64)


def _feistel(value: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of [0, 2^bits): the two halves of the bits change each other in turn."""
    low_bits = np.uint64((bits + 1) // 2)
    low_mask = np.uint64((1 << int(low_bits)) - 1)
    high_mask = np.uint64((1 << (bits - int(low_bits))) - 1)
    high, low = value >> low_bits, value & low_mask
    for key in keys.reshape(-1, 2):
        high = high ^ (_mix(low, key[0]) & high_mask)
        low = low ^ (_mix(high, key[1]) & low_mask)
    return high << low_bits | low


def _mix(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """A keyed hash of each value to 64 bits: the finaliser of splitmix64 (Steele et al., 2014), modulo 2^64."""
    value = (value ^ key) * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = blake2b(f"order/{seed}/{epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8")


class Apportionment:
    """Assigns the samples 0, 1, 2, ... to stores in proportion to their weights.

    After any number of samples n, each store has given its weighted fraction of n, rounded down or up.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """With one weight above zero for each store."""
        self._weights = np.array([round(weight / sum(weights) * SCALE) for weight in weights], np.int64)
        self._total = int(self._weights.sum())

    def counts(self, n: int) -> np.ndarray:
        """How many of the first n samples each store gives: int64 `[stores]`."""
        counts, remainder = np.divmod(n * self._weights, self._total)
        closing = -(-(counts + 1) * self._total // self._weights)
        # Before these s no window of a later sample is open, and the minimum is the one of s = 0, which is n.
        s = np.arange(max(1, n - self._total // int(self._weights.min()) - 1), n + 1)
        opened = -(-s * self._weights[:, None] // self._total)
        served = n - s + np.minimum(opened, counts[:, None]).sum(0)
        done = int(counts.sum())
        # A store whose fraction of n is not whole may have given one sample more: tried in order of precedence.
        for store in sorted(np.flatnonzero(remainder), key=lambda store: (closing[store], store)):
            served += opened[store] > counts[store]
            before, done = done, min(n, int(served.min()))
            counts[store] += done - before
        return counts

    def run(self, n: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The store of each of the samples n .. n + length - 1, and its number among that store's samples."""
        weights, total, given = self._weights.tolist(), self._total, self.counts(n).tolist()
        opens = [i * total // weight for i, weight in zip(given, weights, strict=True)]
        closes = [-(-(i + 1) * total // weight) for i, weight in zip(given, weights, strict=True)]
        stores, numbers = np.empty(length, np.int64), np.empty(length, np.int64)
        for step in range(length):
            store = min((c, j) for j, (o, c) in enumerate(zip(opens, closes, strict=True)) if o <= n + step)[1]
            stores[step], numbers[step] = store, given[store]
            given[store] = i = given[store] + 1
            opens[store], closes[store] = i * total // weights[store], -(-(i + 1) * total // weights[store])
        return stores, numbers

    def exhausted(self, store: int, samples: int) -> int:
        """The least n after which the store has given `samples`, at least one."""
        weight = int(self._weights[store])
        low, high = (samples - 1) * self._total // weight, -(-samples * self._total // weight)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.counts(middle)[store] >= samples else (middle, high)
        return high


@dataclass(frozen=True)
class _Phase:
    """Samples `first` to `end` (exclusive, None: endless), during which the same stores take part."""

    first: int
    end: int | None
    stores: np.ndarray
    given: np.ndarray
    """Samples that each of these stores gave before."""
    apportionment: Apportionment


class BlendOrder:
    """Which store each sample of a run comes from, and which of that store's samples it is.

    Stores give samples in proportion to their weights, each at most its limit (None: no limit). When a store has given
    all, the others continue in proportion to their weights.
    """

    def __init__(self, weights: Sequence[float], limits: Sequence[int | None]) -> None:
        self._phases = list(_phases(weights, limits))
        self.samples = self._phases[-1].end
        """How many samples all stores give; None without end."""
        self._block = lru_cache(maxsize=4)(self._find_block)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The store of each sample `[B]`, and the sample's number among that store's: int64 `[B]` each."""
        if self.samples is not None and samples.size and samples.max() >= self.samples:
            raise UserError(
                f"The stores of data.blend give {self.samples:,} samples within their epochs and budgets, but sample "
                f"{samples.max():,} is needed: raise them, or lower training.steps."
            )
        block, within = np.divmod(samples, BLOCK)
        stores, numbers = np.empty_like(block), np.empty_like(block)
        for index in np.unique(block):
            chosen = block == index
            found = self._block(int(index))
            stores[chosen], numbers[chosen] = (column[within[chosen]] for column in found)
        return stores, numbers

    def _find_block(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Stores and numbers of the samples from index · BLOCK on: BLOCK of them, or as many as there are."""
        stores, numbers = [], []
        for phase in self._phases:
            first = max(index * BLOCK, phase.first)
            end = (index + 1) * BLOCK if phase.end is None else min((index + 1) * BLOCK, phase.end)
            if first < end:
                store, number = phase.apportionment.run(first - phase.first, end - first)
                stores.append(phase.stores[store])
                numbers.append(phase.given[store] + number)
        return np.concatenate(stores), np.concatenate(numbers)


def _phases(weights: Sequence[float], limits: Sequence[int | None]) -> Iterator[_Phase]:
    """The phases of a blend: each but an endless one ends when a store has given all it may."""
    given, first = np.zeros(len(weights), np.int64), 0
    stores = np.arange(len(weights))
    while len(stores):
        apportionment = Apportionment([weights[store] for store in stores])
        left = [None if limits[store] is None else limits[store] - int(given[store]) for store in stores]
        ends = [apportionment.exhausted(index, count) for index, count in enumerate(left) if count is not None]
        length = min(ends, default=None)
        yield _Phase(first, None if length is None else first + length, stores, given[stores], apportionment)
        if length is None:
            return
        given[stores] += apportionment.counts(length)
        first += length
        stores = np.array([store for store in stores if limits[store] is None or given[store] < limits[store]])
