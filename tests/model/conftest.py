import json

import pytest
import torch
from golden_numbers import GOLDEN
from safetensors.torch import load_file
from torch import Tensor

from calm_core.config.model_config import BackboneConfig, HeadConfig, ModelShape
from calm_core.reference.names import HEAD, HEAD_ALIAS


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "tiny.golden.safetensors")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return load_file(GOLDEN / "tiny.weights.safetensors")


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    recorded = json.loads((GOLDEN / "tiny.config.json").read_text())["calm"]
    backbone = BackboneConfig(
        layers=recorded["num_hidden_layers"],
        hidden=recorded["hidden_size"],
        ffn=recorded["intermediate_size"],
        heads=recorded["num_attention_heads"],
        kv_groups=recorded["num_key_value_heads"],
        norm_eps=recorded["rms_norm_eps"],
        rope_base=recorded["rope_theta"],
    )
    head = HeadConfig(
        blocks=recorded["num_mlp_layers"],
        noise=recorded["noise_size"],
        samples=recorded["num_samples"],
        target_samples=recorded["num_target_samples"],
        target_group=1,
        beta=recorded["beta"],
    )
    return ModelShape(backbone, head, recorded["vocab_size"], recorded["patch_size"], recorded["latent_size"])


@pytest.fixture(scope="module")
def reference(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's weights of the network, the head under one of its two names."""
    energy = {name.removeprefix("energy."): w for name, w in weights.items() if name.startswith("energy.")}
    aliases = {name: energy.pop(name) for name in list(energy) if name.startswith(HEAD_ALIAS)}
    assert aliases
    assert all(torch.equal(w, energy[name.replace(HEAD_ALIAS, HEAD)]) for name, w in aliases.items())
    return energy
