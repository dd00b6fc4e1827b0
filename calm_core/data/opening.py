"""What a run reads: the stores that `data` names, opened as the model needs them."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from calm_core.autoencoder import Autoencoder
from calm_core.data.blend import Blend, StoreShare
from calm_core.data.config import DataConfig
from calm_core.data.encoded_store import EncodedStore
from calm_core.data.store import ChunkStore, Store, TokenStore
from calm_core.errors import UserError
from calm_core.folded_encoder import FoldedEncoder

if TYPE_CHECKING:
    from calm_core.experiment import Paths


class Rows(NamedTuple):
    """What a run trains on, and what it is scored on."""

    train: Blend
    held_out: Store


def token_rows(data: DataConfig, paths: "Paths") -> Rows:
    """Single tokens: of the token stores of `data.blend`, or of `paths.tokens`."""
    return _rows(data, _places(data, "tokens", paths), partial(TokenStore, verify=data.verify))


def chunk_rows(data: DataConfig, paths: "Paths", autoencoder: Autoencoder) -> Rows:
    """Chunks with their latents, stored or encoded as they are read: of `data.blend`, or of `paths`.

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
        read = partial(EncodedStore, autoencoder=autoencoder, verify=data.verify, encoder=encoder)
        return _rows(data, _places(data, "tokens", paths), read)
    rows = _rows(data, _places(data, "chunks", paths), partial(ChunkStore, verify=data.verify))
    for store in rows.train.stores:
        store.require(data.k, autoencoder.content_hash)
        if store.packing != data.packing:
            raise UserError(
                f"data.packing={data.packing}, but the chunks in {store.folder} were made with {store.packing}: "
                f"set data.packing={store.packing}, or make the chunks again."
            )
    return rows


def _rows(data: DataConfig, places: list[Path], read: Callable[[Path, str], Store]) -> Rows:
    stores = [read(place, "train") for place in places]
    for store in stores:
        data.require_vocabulary(store.vocab_size, store.folder)
    return Rows(Blend(stores, data.blend or [StoreShare()]), read(places[0], "held_out"))


def _places(data: DataConfig, kind: Literal["tokens", "chunks"], paths: "Paths") -> list[Path]:
    """The stores of one kind that the blend names, or the one of the run."""
    for number, share in enumerate(data.blend):
        if not getattr(share, kind):
            raise UserError(f"data.blend[{number}] names no store of {kind}, which this run reads: add {kind}: FOLDER.")
    return [Path(getattr(share, kind)) for share in data.blend] or [getattr(paths, kind)]
