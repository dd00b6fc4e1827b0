"""`config.json` of the public reference implementation, and our configurations."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from calm_core.config.model_config import AutoencoderConfig, BackboneConfig, HeadConfig, ModelShape
from calm_core.errors import UserError
from calm_core.inference.load_model import DocumentFormat

_AUTOENCODER = {
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "latent_size": "latent",
    "kl_clamp": "kl_floor",
    "kl_weight": "kl_weight",
    "ae_dropout": "token_dropout",
    "rms_norm_eps": "norm_eps",
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

_DOCUMENT_EOS, _DOCUMENT_PACKING = "document_eos", "document_packing"

# Values that say what our networks are in any case: a network with another value cannot be imported.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0),
    "partial_rotary_factor": (1, 1.0),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "num_encoder_layers": (2,),
    "num_decoder_layers": (2,),
    "quantization_config": (None,),
}

_LAYER_NORM_EPS = 1e-6  # of the reference's LayerNorms, whatever its RMSNorms have; ours all have one

# Keys that change nothing in the network.
_HARMLESS = {
    *("_name_or_path", "architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "tokenizer_class", "vocab_size", "patch_size"),
    *("ae_path", "ae_name_or_path", "initializer_range", "pretraining_tp", "use_cache", "tie_word_embeddings"),
    *("_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "return_dict", "is_decoder"),
    *("output_attentions", "output_hidden_states", "is_encoder_decoder", "use_return_dict", "latent_size"),
    *("max_position_embeddings", "id2label", "label2id", "chunk_size_feed_forward", "problem_type"),
    *(_DOCUMENT_EOS, _DOCUMENT_PACKING),
}

_CHECKED_SEPARATELY = {"rope_scaling", "rope_parameters", "rope_theta", "head_dim", "rms_norm_eps"}


_ARCHITECTURES = {"energy": "EnergyTransformer", "diffusion": "DiffusionTransformer", "flow": "FlowTransformer"}


class AutoencoderSize(NamedTuple):
    """All that fixes the parameters of an autoencoder: its configuration, V and K."""

    config: AutoencoderConfig
    vocab_size: int
    k: int


def autoencoder_size(config: Mapping[str, Any], path: Path) -> AutoencoderSize:
    """The reference's autoencoder; both of our dropouts are its `ae_dropout`.

    Raises:
        UserError: the file at `path` lacks a size, or describes another network.
    """
    _require(config, _SIZES, path)
    _require_understood(config, {*_AUTOENCODER}, path)
    taken = _taken(AutoencoderConfig, _AUTOENCODER, config, path)
    if "token_dropout" in taken:
        taken["latent_dropout"] = taken["token_dropout"]
    return AutoencoderSize(AutoencoderConfig(**taken), config["vocab_size"], config["patch_size"])


def model_shape(config: Mapping[str, Any], kind: str, path: Path) -> ModelShape:
    """The shape of the reference's network with a head of this kind; what its file does not say has our default.

    Raises:
        UserError: the file at `path` lacks a size, or describes another network.
    """
    _require(config, _CALM_SIZES, path)
    _require_understood(config, {*_BACKBONE, *_HEAD}, path)
    if (eps := config.get("rms_norm_eps", _LAYER_NORM_EPS)) != _LAYER_NORM_EPS:
        raise UserError(
            f"{path} says rms_norm_eps={eps}, but its LayerNorms have {_LAYER_NORM_EPS:g}, and all norms of a "
            "model have one epsilon here: this model cannot be imported."
        )
    backbone = BackboneConfig(**_taken(BackboneConfig, _BACKBONE, config, path) | _rope_base(config, path))
    if (width := config.get("head_dim")) not in (None, backbone.hidden // backbone.heads):
        raise UserError(
            f"{path} says head_dim={width}, but here it is always hidden_size / num_attention_heads = "
            f"{backbone.hidden // backbone.heads}: this model cannot be imported."
        )
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
    sizes = {"vocab_size": size.vocab_size, "patch_size": size.k, **named, "intermediate_size": size.config.ffn_width}
    return {"model_type": "autoencoder", "architectures": ["Autoencoder"], **sizes}


def reference_calm(shape: ModelShape, longest: int) -> dict[str, Any]:
    """The reference's configuration of a network for sequences of up to `longest` chunks."""
    return {
        "model_type": "calm",
        "architectures": [_ARCHITECTURES[shape.head.kind]],
        "vocab_size": shape.vocabulary,
        "patch_size": shape.k,
        "latent_size": shape.latent,
        **{theirs: getattr(shape.backbone, ours) for theirs, ours in _BACKBONE.items()},
        **{theirs: getattr(shape.head, ours) for theirs, ours in _HEAD.items()},
        "num_key_value_heads": shape.backbone.key_value_heads,
        "num_mlp_layers": shape.head.block_count(shape.backbone.layers),
        _POSITIONS: longest,
    }


def reference_documents(documents: DocumentFormat) -> dict[str, Any]:
    """How documents are stored in the data, under keys of our own, which the reference ignores."""
    return {_DOCUMENT_EOS: documents.eos, _DOCUMENT_PACKING: documents.packing}


def documents_of(config: Mapping[str, Any]) -> DocumentFormat:
    """The inverse of `reference_documents`; our default where a folder says nothing."""
    usual = DocumentFormat()
    return DocumentFormat(config.get(_DOCUMENT_EOS, usual.eos), config.get(_DOCUMENT_PACKING, usual.packing))


def require_exportable(shape: ModelShape, path: Path) -> None:
    """Refuse a model that the reference's network cannot be.

    Raises:
        UserError: its LayerNorms have another epsilon than the reference's, whose configuration does not give it.
    """
    if shape.backbone.norm_eps != _LAYER_NORM_EPS:
        raise UserError(
            f"{path} was trained with model.norm_eps={shape.backbone.norm_eps}, but the reference's LayerNorms always "
            f"have {_LAYER_NORM_EPS:g}: this model cannot be exported."
        )


def llama_config(shape: ModelShape, longest: int) -> dict[str, Any]:
    """The `config.json` of a plain Llama: our autoregressive baseline is one."""
    backbone = shape.backbone
    named = {theirs: getattr(backbone, ours) for theirs, ours in _BACKBONE.items()}
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": shape.vocabulary,
        **named,
        "num_key_value_heads": backbone.key_value_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": backbone.rope_base},
        "head_dim": backbone.hidden // backbone.heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": "float32",
        _POSITIONS: longest,
    }


def _require_understood(config: Mapping[str, Any], read: Collection[str], path: Path) -> None:
    """Refuse keys that say that the network is another one than ours, or that nothing here knows."""
    for key, value in config.items():
        if key in _FIXED and value is not None and value not in _FIXED[key]:
            raise UserError(
                f"{path} says {key}={value!r}, but only {_FIXED[key][0]!r} can be imported: the network differs."
            )
        if key not in {*read, *_FIXED, *_HARMLESS, *_CHECKED_SEPARATELY} and value is not None:
            raise UserError(
                f"{path} says {key}={value!r}, which is not known here: remove the key if it changes nothing in the "
                "network, otherwise the model cannot be imported."
            )


def _rope_base(config: Mapping[str, Any], path: Path) -> dict[str, float]:
    """The base of the rotary embedding, which is in `rope_theta` or inside `rope_parameters` or `rope_scaling`."""
    found = {"rope_theta": config.get("rope_theta")}
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise UserError(f"{path} says {name}={rope!r}: it must be a mapping or null.")
        unknown = {
            key: value
            for key, value in rope.items()
            if not (key == "rope_theta" or (key in ("rope_type", "type") and value == "default"))
        }
        if unknown:
            raise UserError(
                f"{path} says {name}={dict(rope)}, but only rotary positions of rope_type default can be imported."
            )
        found[f"{name}.rope_theta"] = rope.get("rope_theta")
    bases = {name: value for name, value in found.items() if value is not None}
    for name, value in bases.items():
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise UserError(f"{path} says {name}={value!r}: it must be a number above 0.")
    if len(set(bases.values())) > 1:
        given = " and ".join(f"{name}={value}" for name, value in bases.items())
        raise UserError(f"{path} says {given}: keep the one that the model was trained with.")
    return {"rope_base": float(next(iter(bases.values())))} if bases else {}


def _require(config: Mapping[str, Any], sizes: tuple[str, ...], path: Path) -> None:
    for name in sizes:
        if type(config.get(name)) is not int or config[name] < 1:
            raise UserError(f"{path} says {name}={config.get(name)!r}: it must be a whole number of at least 1.")


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
