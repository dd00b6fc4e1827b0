"""The config.json of the reference: what can be imported, and what is refused."""

from pathlib import Path

import pytest
from reference_folders import CONFIGS

from calm_core.errors import UserError
from calm_core.reference.config_json import autoencoder_size, model_shape


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            "rope_scaling=.*only rotary positions of",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_parameters=.*only rotary positions"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta=10000.0 and rope_parameters.rope_theta=500000.0"),
        ({"rope_theta": "big"}, "rope_theta='big'"),
        ({"rope_parameters": "default"}, "rope_parameters='default'.*mapping"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', but only 'silu' can be imported"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05, but its LayerNorms have 1e-06"),
        ({"head_dim": 16}, "head_dim=16.*= 8"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"sliding_window": 64}, "sliding_window=64"),
        ({"new_kind_of_norm": "q"}, "new_kind_of_norm='q', which is not known here"),
    ],
)
def test_a_configuration_of_another_network_is_refused(change: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        model_shape(CONFIGS["calm"] | change, "energy", tmp_path / "config.json")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 500000, "rope_scaling": {"type": "default"}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}, "head_dim": 8, "hidden_act": "silu"},
    ],
)
def test_the_rotary_base_is_read_wherever_it_is(rope: dict, tmp_path: Path) -> None:
    assert model_shape(CONFIGS["calm"] | rope, "energy", tmp_path).backbone.rope_base == 5e5


def test_the_epsilon_of_an_autoencoder_is_kept(tmp_path: Path) -> None:
    assert autoencoder_size(CONFIGS["autoencoder"] | {"rms_norm_eps": 1e-5}, tmp_path).config.norm_eps == 1e-5
    with pytest.raises(UserError, match="hidden_act='gelu'"):
        autoencoder_size(CONFIGS["autoencoder"] | {"hidden_act": "gelu"}, tmp_path)
    with pytest.raises(UserError, match="num_encoder_layers=3"):
        autoencoder_size(CONFIGS["autoencoder"] | {"num_encoder_layers": 3}, tmp_path)
