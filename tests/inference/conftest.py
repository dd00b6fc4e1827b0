from pathlib import Path

import pytest
import torch

from calm_core.autoencoder.model import Autoencoder
from calm_core.config.data_config import TokenizerConfig
from calm_core.config.model_config import AutoencoderConfig, BackboneConfig, HeadConfig, ModelShape
from calm_core.config.training_config import ParallelConfig
from calm_core.distributed.topology import Topology
from calm_core.inference.load_model import Loaded
from calm_core.model.backbone import transformer_config
from calm_core.model.calm import CalmModel
from calm_core.model.parameters import initialize
from calm_core.tokenizer import Tokenizer, load_tokenizer
from calm_core.tokenizer.sentencepiece import train_tokenizer

WORDS = ["the quick brown fox jumps over the lazy dog", "a naïve 😀 state of the union, 1790 to 2020"]


@pytest.fixture(scope="session")
def spoken_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spoken") / "tokenizer.model"
    train_tokenizer(WORDS * 20, TokenizerConfig(vocab_size=300), path, {})
    return path


@pytest.fixture(scope="session")
def spoken(spoken_path: Path) -> Tokenizer:
    """A tokenizer of 300 tokens."""
    return load_tokenizer(spoken_path)


@pytest.fixture(scope="module")
def loaded(topology: Topology, spoken: Tokenizer) -> Loaded:
    """A random model whose draws of a chunk sometimes agree."""
    return random_model(spoken)


def random_model(tokenizer: Tokenizer, k: int = 3, spread: float = 0.3) -> Loaded:
    torch.manual_seed(0)
    latent = 8
    autoencoder = Autoencoder(
        AutoencoderConfig(hidden=16, latent=latent, init_std=spread), tokenizer.vocab_size, k
    ).eval()
    shape = ModelShape(
        BackboneConfig(hidden=32, ffn=64, layers=2, heads=4, init_std=0.3),
        HeadConfig(noise=4),
        tokenizer.vocab_size,
        k,
        latent,
    )
    model = CalmModel(transformer_config(shape.backbone, ParallelConfig()), shape).eval()
    initialize([model], 0.3, seed=0)
    torch.nn.init.normal_(model.head.out_reduce.weight, std=0.3)
    return Loaded(model, autoencoder, tokenizer, positions=40)
