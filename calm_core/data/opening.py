"""What a run reads: the stores that `data` names, opened as the model needs them."""

from pathlib import Path
from typing import Literal, NamedTuple

from calm_core.autoencoder import Autoencoder
from calm_core.data.blend import Blend, StoreShare
from calm_core.data.config import DataConfig
from calm_core.data.store import ChunkStore, Store, TokenStore
from calm_core.errors import UserError


class Rows(NamedTuple):
    """What a run trains on, and what it is scored on."""

    train: Blend
    held_out: Store


def token_rows(data: DataConfig, tokens: Path) -> Rows:
    """Single tokens: of `data.blend`, or of the store `tokens`."""
    places = _places(data, "tokens", tokens)
    stores = [TokenStore(place, "train", data.verify) for place in places]
    return _rows(data, stores, TokenStore(places[0], "held_out", data.verify))


def chunk_rows(data: DataConfig, chunks: Path, autoencoder: Autoencoder | None = None) -> Rows:
    """Chunks with their latents: of `data.blend`, or of the store `chunks`.

    Raises:
        UserError: if a store is missing or damaged, or not made by the autoencoder as data.k and data.packing say.
    """
    places = _places(data, "chunks", chunks)
    stores = [ChunkStore(place, "train", data.verify) for place in places]
    if autoencoder is not None:
        for store in stores:
            store.require(data.k, autoencoder.content_hash)
            if store.packing != data.packing:
                raise UserError(
                    f"data.packing={data.packing}, but the chunks in {store.folder} were made with {store.packing}: "
                    f"set data.packing={store.packing}, or make the chunks again."
                )
    return _rows(data, stores, ChunkStore(places[0], "held_out", data.verify))


def _rows(data: DataConfig, stores: list[Store], held_out: Store) -> Rows:
    rows = Rows(Blend(stores, data.blend or [StoreShare()]), held_out)
    for store in stores:
        data.require_vocabulary(store.vocab_size, store.folder)
    return rows


def _places(data: DataConfig, kind: Literal["tokens", "chunks"], default: Path) -> list[Path]:
    """The stores of one kind that a blend names."""
    for number, share in enumerate(data.blend):
        if not getattr(share, kind):
            raise UserError(f"data.blend[{number}] names no store of {kind}, which this run reads: add {kind}: FOLDER.")
    return [Path(getattr(share, kind)) for share in data.blend] or [default]
