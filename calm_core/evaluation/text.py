"""A text as a store, to score a model on it."""

from pathlib import Path

from calm_core.autoencoder import Autoencoder
from calm_core.data.chunks import build_chunks
from calm_core.data.config import DataConfig
from calm_core.data.packing import Packing
from calm_core.data.store import ChunkStore, TokenStore
from calm_core.data.tokens import build_tokens
from calm_core.tokenizer import Tokenizer


def tokens_of_text(file: Path, tokenizer: Tokenizer, folder: Path) -> TokenStore:
    """The documents of a txt, jsonl or parquet file, tokenized into a store below `folder`."""
    build_tokens(DataConfig(corpus=[str(file)], held_out=0.0), tokenizer, folder / "tokens")
    return TokenStore(folder / "tokens", "train")


def chunks_of_text(
    file: Path, tokenizer: Tokenizer, autoencoder: Autoencoder, folder: Path, packing: Packing = "pack"
) -> ChunkStore:
    """The documents of a file, tokenized and encoded into a store below `folder`."""
    tokens_of_text(file, tokenizer, folder)
    build_chunks(folder / "tokens", autoencoder, folder / "chunks", packing=packing)
    return ChunkStore(folder / "chunks", "train")
