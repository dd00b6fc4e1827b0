"""`config.json` of the public reference implementation, and our configurations."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from calm_core.config.model_config import AutoencoderConfig, BackboneConfig, HeadConfig, ModelShape
from calm_core.errors import UserError

_AUTOENCODER = {
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "latent_size": "latent",
    "kl_clamp": "kl_floor",
    "kl_weight": "kl_weight",
    "ae_dropout": "token_dropout",
}

_BACKBONE = {
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_groups",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_base",
}

_HEAD = {
    "num_mlp_layers": "blocks",
    "noise_size": "noise",
    "num_samples": "samples",
    "num_target_samples": "target_samples",
    "beta": "beta",
}

_SIZES = ("vocab_size", "patch_size", "latent_size", "hidden_size", "intermediate_size")

_CALM_SIZES = (*_SIZES, "num_hidden_layers", "num_attention_heads", "num_mlp_layers")

_POSITIONS = "max_position_embeddings"


class AutoencoderSize(NamedTuple):
    """All that fixes the parameters of an autoencoder: its configuration, V and K."""

    config: AutoencoderConfig
    vocab_size: int
    k: int


def autoencoder_size(config: Mapping[str, Any], path: Path) -> AutoencoderSize:
    """The reference's autoencoder; both of our dropouts are its `ae_dropout`.

    Raises:
        UserError: a size is missing in the file at `path`, or is none.
    """
    _require(config, _SIZES, path)
    taken = _taken(AutoencoderConfig, _AUTOENCODER, config, path)
    if "token_dropout" in taken:
        taken["latent_dropout"] = taken["token_dropout"]
    return AutoencoderSize(AutoencoderConfig(**taken), config["vocab_size"], config["patch_size"])


def model_shape(config: Mapping[str, Any], kind: str, path: Path) -> ModelShape:
    """The shape of the reference's network with a head of this kind; what its file does not say has our default.

    Raises:
        UserError: a size is missing in the file at `path`, or is none.
    """
    _require(config, _CALM_SIZES, path)
    backbone = BackboneConfig(**_taken(BackboneConfig, _BACKBONE, config, path))
    head = HeadConfig(kind=kind, **_taken(HeadConfig, _HEAD, config, path))
    return ModelShape(backbone, head, config["vocab_size"], config["patch_size"], config["latent_size"])


def positions(config: Mapping[str, Any], path: Path) -> int:
    """The longest sequence, in chunks.

    Raises:
        UserError: the file at `path` does not say it.
    """
    _require(config, (_POSITIONS,), path)
    return config[_POSITIONS]


def reference_autoencoder(size: AutoencoderSize) -> dict[str, Any]:
    """The reference's configuration of an autoencoder."""
    named = {theirs: getattr(size.config, ours) for theirs, ours in _AUTOENCODER.items()}
    return {"vocab_size": size.vocab_size, "patch_size": size.k, **named, "intermediate_size": size.config.ffn_width}


def reference_calm(shape: ModelShape, longest: int) -> dict[str, Any]:
    """The reference's configuration of a network for sequences of up to `longest` chunks."""
    return {
        "vocab_size": shape.vocabulary,
        "patch_size": shape.k,
        "latent_size": shape.latent,
        **{theirs: getattr(shape.backbone, ours) for theirs, ours in _BACKBONE.items()},
        **{theirs: getattr(shape.head, ours) for theirs, ours in _HEAD.items()},
        "num_key_value_heads": shape.backbone.key_value_heads,
        "num_mlp_layers": shape.head.block_count(shape.backbone.layers),
        _POSITIONS: longest,
    }


def _require(config: Mapping[str, Any], sizes: tuple[str, ...], path: Path) -> None:
    for name in sizes:
        if type(config.get(name)) is not int or config[name] < 1:
            raise UserError(f"{path} says {name}={config.get(name)!r}: it must be a whole number from 1 on.")


def _taken(cls: type, names: Mapping[str, str], config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The fields of `cls` that the reference's configuration sets, under our names."""
    hints, taken = get_type_hints(cls), {}
    for theirs, ours in names.items():
        value = config.get(theirs)
        if value is None:
            continue
        if type(value) not in (int, hints[ours]):
            raise UserError(f"{path} says {theirs}={value!r}: it must be of type {hints[ours].__name__}.")
        taken[ours] = hints[ours](value)
    return taken
