import json

import pytest
import torch

from calm_core.autoencoder.artefact import load_autoencoder, save_autoencoder
from calm_core.autoencoder.model import Autoencoder
from calm_core.config.model_config import AutoencoderConfig
from calm_core.errors import UserError


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Autoencoder(AutoencoderConfig(hidden=16, latent=4), vocab_size=20, k=3)


def test_what_is_saved_is_read_back_frozen(tmp_path, model):
    content_hash = save_autoencoder(model, tmp_path / "frozen", "tokens-hash", {"step": 7})
    frozen = load_autoencoder(tmp_path / "frozen")
    assert (frozen.content_hash, frozen.tokenizer_hash) == (content_hash, "tokens-hash")
    assert (frozen.k, frozen.vocab_size, frozen.config) == (3, 20, model.config)
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    tokens = torch.randint(20, (5, 3))
    assert torch.equal(frozen.encode(tokens)[0], model.encode(tokens)[0])
    assert json.loads((tmp_path / "frozen" / "manifest.json").read_text())["provenance"] == {"step": 7}


def test_the_hash_is_that_of_the_weights(tmp_path, model):
    first = save_autoencoder(model, tmp_path / "first", "a", {})
    assert save_autoencoder(model, tmp_path / "again", "b", {"x": 1}) == first
    with torch.no_grad():
        model.embedding.weight[0, 0] += 1
    assert save_autoencoder(model, tmp_path / "other", "a", {}) != first


def test_changed_weights_are_refused_by_name(tmp_path, model):
    save_autoencoder(model, tmp_path, "a", {})
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors.*hash"):
        load_autoencoder(tmp_path)


def test_missing_parts_are_named(tmp_path, model):
    with pytest.raises(UserError, match=r"manifest\.json"):
        load_autoencoder(tmp_path)
    save_autoencoder(model, tmp_path, "a", {})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        load_autoencoder(tmp_path)
