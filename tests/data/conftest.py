import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from calm_core.autoencoder.model import Autoencoder
from calm_core.config.data_config import DataConfig, TokenizerConfig
from calm_core.config.model_config import AutoencoderConfig
from calm_core.data.chunks import build_chunks
from calm_core.data.tokens import build_tokens
from calm_core.tokenizer import Tokenizer, load_tokenizer
from calm_core.tokenizer.sentencepiece import train_tokenizer

DOCUMENTS = 60


def texts(seed: int = 0) -> list[str]:
    """Documents of 1 to 200 words, with newlines, digits and some characters beyond ASCII."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 8))) for _ in range(300)] + ["naïve", "2048", "😀"]
    return [" ".join(draw.choices(words, k=draw.randint(1, 200))).replace(" e", "\n") for _ in range(DOCUMENTS)]


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(texts(), TokenizerConfig(vocab_size=400), path, {})
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A corpus of two files, and shards of which none holds more than a few documents."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": text}) for text in texts()]
    (folder / "a.jsonl").write_text("\n".join(lines[:25]) + "\n")
    (folder / "b.jsonl").write_text("\n".join(lines[25:]))
    return DataConfig(corpus=[f"{folder}/*.jsonl"], held_out=0.25, shard_bytes=6000)


@pytest.fixture(scope="session")
def tokens(config: DataConfig, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "tokens"
    build_tokens(config, tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def autoencoder_of() -> Callable[..., Autoencoder]:
    return make_autoencoder


def make_autoencoder(tokenizer: Tokenizer, k: int = 4) -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig(hidden=16, latent=8), tokenizer.vocab_size, k)
    model.content_hash, model.tokenizer_hash = "an autoencoder", tokenizer.content_hash
    return model


@pytest.fixture
def autoencoder(tokenizer: Tokenizer) -> Autoencoder:
    return make_autoencoder(tokenizer)


@pytest.fixture(scope="session")
def built_chunks(tokens: Path, tokenizer: Tokenizer) -> Path:
    """A chunk store to read; `chunks` is a copy to break."""
    folder = tokens.parent / "chunks"
    build_chunks(tokens, make_autoencoder(tokenizer), folder)
    return folder


@pytest.fixture
def chunks(built_chunks: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built_chunks, tmp_path / "chunks"))


@pytest.fixture(scope="session")
def other_tokens(config: DataConfig, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Part of the corpus, split otherwise, to blend with `tokens`."""
    folder = tmp_path_factory.mktemp("other") / "tokens"
    part = replace(config, corpus=[config.corpus[0].replace("*", "b")], held_out=0.5)
    build_tokens(part, tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def other_chunks(other_tokens: Path, tokenizer: Tokenizer) -> Path:
    """Their chunks, by the autoencoder of `built_chunks`."""
    folder = other_tokens.parent / "chunks"
    build_chunks(other_tokens, make_autoencoder(tokenizer), folder)
    return folder
