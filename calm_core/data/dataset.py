"""The samples of a run: windows of the stores that it reads, and the micro-batches made of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, FoldedEncoder
from calm_core.config.data_config import DataConfig, StoreShare, weights_of
from calm_core.config.experiment import Paths
from calm_core.data.chunks import EncodedStore
from calm_core.data.order import BlendOrder, SampleOrder
from calm_core.data.store import ALL, ChunkStore, Store, TokenStore
from calm_core.errors import UserError
from calm_core.model.heads import Target


@dataclass(frozen=True)
class Blend:
    """The training splits of one or several stores, all of one tokenizer, K and autoencoder.

    The held-out split, the baselines and the shapes are those of the first store.
    """

    stores: Sequence[Store]
    shares: Sequence[StoreShare]

    @classmethod
    def of(cls, store: Store) -> "Blend":
        """A store by itself."""
        return cls([store], [StoreShare()])

    def __post_init__(self) -> None:
        for store in self.stores[1:]:
            for name, value in store.common_properties.items():
                if value != self.first.common_properties[name]:
                    raise UserError(
                        f"{store.folder} and {self.first.folder} differ in the {name} ({value} and "
                        f"{self.first.common_properties[name]}): data.blend takes stores of one kind, make one again."
                    )

    @property
    def first(self) -> Store:
        """The store that the others must agree with."""
        return self.stores[0]

    @property
    def identity(self) -> Any:
        """What a resumed run must have in common: the data of a single store; for several, their data and weights."""
        if len(self.stores) == 1 and self.shares[0].limit(1, 1) is None:
            return self.first.identity
        return [
            {"data": store.identity, "weight": share.weight, "budget": share.budget, "epochs": share.epochs}
            for store, share in zip(self.stores, self.shares, strict=True)
        ]


class Rows(NamedTuple):
    """What a run trains on, and what it is scored on."""

    train: Blend
    held_out: Store


def token_rows(data: DataConfig, paths: Paths, share: slice = ALL) -> Rows:
    """Single tokens: of the token stores of `data.blend`, or of `paths.tokens`; `share` as in `chunk_rows`."""
    return _open(data, store_folders(data, "tokens", paths), partial(TokenStore, verify=data.verify, share=share))


def chunk_rows(data: DataConfig, paths: Paths, autoencoder: Autoencoder, share: slice = ALL) -> Rows:
    """Chunks with their latents, stored or encoded as they are read: of `data.blend`, or of `paths`.

    Ranks that open the same stores each verify their `share` of the shards.

    Raises:
        UserError: if a store is missing or damaged, or not made by the autoencoder as data.k and data.packing say.
    """
    if data.latents == "encode":
        if autoencoder.k != data.k:
            raise UserError(
                f"data.k={data.k}, but {paths.autoencoder} is made for {autoencoder.k} tokens per chunk: "
                f"set data.k={autoencoder.k} or data.autoencoder to another one."
            )
        encoder = cache(partial(FoldedEncoder, autoencoder))
        open_store = partial(EncodedStore, autoencoder=autoencoder, verify=data.verify, share=share, encoder=encoder)
        return _open(data, store_folders(data, "tokens", paths), open_store)
    rows = _open(data, store_folders(data, "chunks", paths), partial(ChunkStore, verify=data.verify, share=share))
    for store in rows.train.stores:
        store.require(data.k, autoencoder.content_hash)
        if store.packing != data.packing:
            raise UserError(
                f"data.packing={data.packing}, but the chunks in {store.folder} were made with {store.packing}: "
                f"set data.packing={store.packing}, or make the chunks again."
            )
    return rows


def _open(data: DataConfig, folders: list[Path], open_store: Callable[[Path, str], Store]) -> Rows:
    stores = [open_store(folder, "train") for folder in folders]
    for store in stores:
        data.require_vocabulary(store.vocab_size, store.folder)
    return Rows(Blend(stores, data.blend or [StoreShare()]), open_store(folders[0], "held_out"))


def store_folders(data: DataConfig, kind: Literal["tokens", "chunks"], paths: Paths) -> list[Path]:
    """The stores of one kind that the blend names, or the one of the run."""
    for number, share in enumerate(data.blend):
        if not getattr(share, kind):
            raise UserError(f"data.blend[{number}] names no store of {kind}, which this run reads: add {kind}: FOLDER.")
    return [Path(getattr(share, kind)) for share in data.blend] or [getattr(paths, kind)]


@dataclass(frozen=True)
class Windows:
    """The windows of S positions in a split: window w is the rows from w·S to w·S + S inclusive.

    Row i of a window is an input and row i + 1 its target. A window's last row is the next window's first: every
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

    def locate(self, windows: np.ndarray) -> list[tuple[Store, int]]:
        """The store and the first row of the windows `[B]`."""
        return [(self.store, int(window) * self.positions) for window in windows]

    def document_ids(self, windows: np.ndarray) -> np.ndarray:
        """The documents that the rows of the windows `[B]` begin in: int64 `[B, S + 1]`, unique within the split."""
        return np.stack([self.store.document_ids(row, self.positions + 1) for _, row in self.locate(windows)])

    def documents(self, window: int) -> list[str]:
        """The names of the documents in a window, in their order."""
        ids = dict.fromkeys(self.document_ids(np.array([window]))[0].tolist())
        return [self.store.document_name(document_id) for document_id in ids]


class TrainingSamples:
    """The samples of a run: windows of S positions of a blend, in an order that follows from the seed alone.

    Each store gives samples in proportion to its weight; each epoch of a store visits its windows in another order.
    """

    def __init__(self, blend: Blend, positions: int, seed: int) -> None:
        """With windows of `positions` + 1 rows.

        Raises:
            UserError: if a store has no window, or a budget below one.
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
        self._blend_order = BlendOrder(weights_of(blend.shares), limits)
        self._orders = [SampleOrder(len(windows), seed + number) for number, windows in enumerate(self.windows)]

    def require(self, samples: int) -> None:
        """Refuse a run of more samples than the stores give.

        Raises:
            UserError: saying how many they give.
        """
        self._blend_order.locate(np.array([samples - 1]))

    def windows_of(self, samples: np.ndarray) -> list[tuple[Windows, int]]:
        """The window that each sample `[B]` is: the windows of its store, and the number among them."""
        stores, numbers = self._blend_order.locate(np.asarray(samples, np.int64))
        chosen = np.empty_like(numbers)
        for store in np.unique(stores):
            chosen[stores == store] = self._orders[store].window(numbers[stores == store])
        return [(self.windows[store], int(window)) for store, window in zip(stores, chosen, strict=True)]

    def locate(self, samples: np.ndarray) -> list[tuple[Store, int]]:
        """The store and the first row of the samples `[B]`."""
        return [(windows.store, window * self.positions) for windows, window in self.windows_of(samples)]

    def documents(self, samples: np.ndarray) -> list[str]:
        """The names of the documents in the samples `[B]`, each once."""
        return list(
            dict.fromkeys(name for windows, window in self.windows_of(samples) for name in windows.documents(window))
        )


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
        return self.tokens.to(device, non_blocking=True)[:, :-1]

    def target(self, device: torch.device) -> Target:
        """Every chunk but the first, positions leading: `[S, B, ...]`."""
        latents = (self.mean, self.log_std) if self.mean is not None else ()
        # Rearranged on the device: on the host it would be a copy.
        tokens, *latents = (x.to(device, non_blocking=True)[:, 1:].transpose(0, 1) for x in (self.tokens, *latents))
        return Target(tokens, *(x.float() for x in latents))


def needed_columns(store: Store, *, first: bool, last: bool) -> list[str]:
    """The columns that a pipeline stage reads: the first its inputs, the last the targets, those between none."""
    if last:
        return list(store.columns)
    return ["tokens"] if first else []


def read_batch(
    source: Windows | TrainingSamples, chosen: np.ndarray, samples: np.ndarray, columns: Iterable[str] | None = None
) -> ChunkBatch:
    """Read the `chosen` windows or samples `[B]` as the samples with these global indices `[B]`.

    `columns` are those to read, None for all. A row of a token store is a chunk of one token. Token ids are widened to
    int64, which embeddings and losses take.
    """
    store, length = source.store, source.positions + 1
    arrays = {}
    for name, (dtype, shape) in store.columns.items():
        if columns is None or name in columns:
            arrays[name] = np.empty((len(chosen), length, *shape), np.int64 if name == "tokens" else dtype)
    if not arrays:
        return ChunkBatch(samples)
    for index, (of_store, row) in enumerate(source.locate(chosen)):
        of_store.fill(row, {name: array[index] for name, array in arrays.items()})
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tokens = tensors.pop("tokens").view(len(chosen), length, store.k)
    return ChunkBatch(samples, tokens, **tensors)
