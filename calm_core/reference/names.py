"""Parameter names of the public reference implementation, and ours.

The autoencoder differs in its names alone. The CALM network also divides some matrices differently: `Link` says which
tensors of the reference hold the same numbers as which of ours, and converts them, both ways. Ours are whole tensors
under the global names of `model.parameters`, as checkpoints hold them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from calm_core.config.model_config import BackboneConfig, ModelShape, padded_vocabulary

BLOCK = {
    "layernorm.weight": "norm.weight",
    "mlp.gate_proj.weight": "gate.weight",
    "mlp.up_proj.weight": "up.weight",
    "mlp.down_proj.weight": "down.weight",
}

# The reference keeps the tied output layer under a second name: equal to the embedding wherever both are present.
AUTOENCODER_TIED = "decoder.lm_head_weight"

AUTOENCODER = {
    "encoder.embed_tokens.weight": "embedding.weight",
    "encoder.squeeze_layer.weight": "encoder_join.weight",
    "encoder.squeeze_layer.bias": "encoder_join.bias",
    "encoder.norm.weight": "encoder_norm.weight",
    "encoder.hidden_to_latent.weight": "encoder_posterior.weight",
    "encoder.hidden_to_latent.bias": "encoder_posterior.bias",
    "decoder.latent_to_hidden.weight": "decoder_input.weight",
    "decoder.latent_to_hidden.bias": "decoder_input.bias",
    "decoder.expand_layer.weight": "decoder_split.weight",
    "decoder.expand_layer.bias": "decoder_split.bias",
    "decoder.norm.weight": "decoder_norm.weight",
} | {
    f"{theirs}.{name}": f"{ours}.{own_name}"
    for theirs, ours in (
        ("encoder.encoder_layers.0", "encoder_token_block"),
        ("encoder.encoder_layers.1", "encoder_chunk_block"),
        ("decoder.decoder_layers.0", "decoder_chunk_block"),
        ("decoder.decoder_layers.1", "decoder_token_block"),
    )
    for name, own_name in BLOCK.items()
}

# The reference holds the energy head under two names: equal wherever both are present.
HEAD, HEAD_ALIAS = "generative_head.", "mlp_generator."

Convert = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Link:
    """Tensors of the reference and tensors of ours that hold the same numbers.

    Attributes:
        theirs: names in the reference.
        ours: names here.
        to_ours: turns their tensors, in the order of `theirs`, into ours.
        to_theirs: its inverse.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Convert
    to_theirs: Convert


def calm_to_ours(theirs: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """The reference's tensors of a model (head under `HEAD`) under our names; linear, so it converts gradients too.

    Raises:
        KeyError: if one is missing.
    """
    return _convert(theirs, [(link.theirs, link.ours, link.to_ours) for link in calm_links(shape)])


def calm_to_theirs(ours: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """The inverse of `calm_to_ours`."""
    return _convert(ours, [(link.ours, link.theirs, link.to_theirs) for link in calm_links(shape)])


def calm_links(shape: ModelShape) -> list[Link]:
    """Every tensor of a CALM network, in the reference and here.

    Raises:
        KeyError: if the reference has no head of this kind (see `_HEADS`).
    """
    backbone = shape.backbone
    layers = [link for layer in range(backbone.layers) for link in _layer(layer, backbone)]
    head = _HEADS[shape.head.kind](backbone.hidden, shape.head.block_count(backbone.layers))
    norm = _renamed({"transformer.norm.weight": "backbone.final_layernorm.weight"})
    embedding = _unpadded("transformer.embed_tokens.weight", "compression.embedding.weight", shape.vocabulary)
    return [embedding, *_weights_and_biases(_COMPRESSION), *layers, *norm, *head]


def llama_links(shape: ModelShape) -> list[Link]:
    """Every tensor of an autoregressive model, in `transformers`' Llama and here."""
    layers = [link for layer in range(shape.backbone.layers) for link in _layer(layer, shape.backbone, "model.")]
    return [
        _unpadded("model.embed_tokens.weight", "compression.embedding.weight", shape.vocabulary),
        *layers,
        *_renamed({"model.norm.weight": "backbone.final_layernorm.weight"}),
        _unpadded("lm_head.weight", "head.out.weight", shape.vocabulary),
    ]


def to_llama(ours: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """The tensors of an autoregressive model under Llama's names."""
    return _convert(ours, [(link.ours, link.theirs, link.to_theirs) for link in llama_links(shape)])


_COMPRESSION = {
    "embed_proj.0": "compression.expand",
    "embed_proj.2": "compression.reduce",
    "embed_proj.3": "compression.norm",
}

_ENERGY = {
    f"{HEAD}noise_embd": "head.noise_in",
    f"{HEAD}norm_noise": "head.noise_norm",
    f"{HEAD}hidden_embd": "head.hidden_in",
    f"{HEAD}norm_hidden": "head.hidden_norm",
    f"{HEAD}final_layer.in_ln": "head.out_norm",
    f"{HEAD}final_layer.linears.0": "head.out_expand",
    f"{HEAD}final_layer.linears.2": "head.out_reduce",
}

# The network of the diffusion head and of the flow head.
_ADAPTIVE = {
    f"{HEAD}net.input_proj": "head.net.latent_in",
    f"{HEAD}net.time_embed.mlp.0": "head.net.time_in",
    f"{HEAD}net.time_embed.mlp.2": "head.net.time_out",
    f"{HEAD}net.cond_embed": "head.net.hidden_in",
    f"{HEAD}net.final_layer.adaLN_modulation.1": "head.net.out_modulation",
    f"{HEAD}net.final_layer.linear": "head.net.out",
}


def _energy_head(hidden: int, blocks: int) -> list[Link]:
    return [*_weights_and_biases(_ENERGY), *(link for index in range(blocks) for link in _block(index, hidden))]


def _adaptive_head(hidden: int, blocks: int) -> list[Link]:
    in_blocks = {theirs: ours for index in range(blocks) for theirs, ours in _adaptive_block(index).items()}
    return _weights_and_biases(_ADAPTIVE | in_blocks)


# The links of a head, from the hidden width and the number of blocks, by `head.kind`.
_HEADS: dict[str, Callable[[int, int], list[Link]]] = {
    "energy": _energy_head,
    "diffusion": _adaptive_head,
    "flow": _adaptive_head,
}


def _adaptive_block(index: int) -> dict[str, str]:
    theirs, ours = f"{HEAD}net.res_blocks.{index}.", f"head.net.blocks.{index}."
    names = {"in_ln": "norm", "mlp.0": "expand", "mlp.2": "reduce", "adaLN_modulation.1": "modulation"}
    return {theirs + name: ours + own for name, own in names.items()}


def _layer(index: int, backbone: BackboneConfig, root: str = "transformer.") -> list[Link]:
    theirs, ours = f"{root}layers.{index}.", f"backbone.layers.{index}."
    names = {
        "input_layernorm.weight": "input_layernorm.weight",
        "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
        "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
        "mlp.gate_proj.weight": "mlp.linear_fc1.weight.gate",
        "mlp.up_proj.weight": "mlp.linear_fc1.weight.up",
        "mlp.down_proj.weight": "mlp.linear_fc2.weight",
    }
    attention = Link(
        tuple(f"{theirs}self_attn.{name}_proj.weight" for name in "qkv"),
        (f"{ours}self_attention.linear_qkv.weight",),
        lambda q, k, v: (_join_attention(q, k, v, backbone),),
        lambda joined: _split_attention(joined, backbone),
    )
    return [attention, *_renamed({theirs + name: ours + own for name, own in names.items()})]


def _join_attention(q: Tensor, k: Tensor, v: Tensor, backbone: BackboneConfig) -> Tensor:
    """Group by group: the queries of a group of heads, then its key, then its value."""
    groups = [x.unflatten(0, (backbone.key_value_heads, -1)) for x in (q, k, v)]
    return torch.cat(groups, dim=1).flatten(0, 1)


def _split_attention(joined: Tensor, backbone: BackboneConfig) -> tuple[Tensor, ...]:
    groups, width = backbone.key_value_heads, backbone.hidden // backbone.heads
    sizes = [width * backbone.heads // groups, width, width]
    return tuple(x.flatten(0, 1) for x in joined.unflatten(0, (groups, -1)).split(sizes, dim=1))


def _block(index: int, hidden: int) -> list[Link]:
    theirs, ours = f"{HEAD}mlp_blocks.{index}.", f"head.blocks.{index}."
    names = {
        "in_ln.weight": "norm.weight",
        "in_ln.bias": "norm.bias",
        "linears.0.bias": "from_condition.bias",
        "linears.2.weight": "mix.weight",
        "linears.2.bias": "mix.bias",
        "down_proj.weight": "down.weight",
        "down_proj.bias": "down.bias",
    }
    halves = Link(
        (f"{theirs}linears.0.weight",),
        (f"{ours}from_sample.weight", f"{ours}from_condition.weight"),
        lambda joined: joined.split(hidden, dim=1),
        lambda *parts: (torch.cat(parts, dim=1),),
    )
    gated = [
        Link(
            (f"{theirs}linears.4.{part}",),
            (f"{ours}gate_up.{part}.gate", f"{ours}gate_up.{part}.up"),
            lambda joined: joined.split(hidden),
            lambda *parts: (torch.cat(parts),),
        )
        for part in ("weight", "bias")
    ]
    return [halves, *gated, *_renamed({theirs + name: ours + own for name, own in names.items()})]


def _unpadded(theirs: str, ours: str, vocabulary: int) -> Link:
    """A matrix of a row for each token; ours has further rows, of zeros, that no token uses."""
    padding = padded_vocabulary(vocabulary) - vocabulary
    return Link(
        (theirs,),
        (ours,),
        lambda rows: (F.pad(rows, (0, 0, 0, padding)),),
        lambda rows: (rows[:vocabulary],),
    )


def _renamed(names: Mapping[str, str]) -> list[Link]:
    return [Link((theirs,), (ours,), lambda x: (x,), lambda x: (x,)) for theirs, ours in names.items()]


def _weights_and_biases(names: Mapping[str, str]) -> list[Link]:
    parts = ("weight", "bias")
    return _renamed({f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in names.items() for part in parts})


def _convert(
    tensors: Mapping[str, Tensor], links: list[tuple[tuple[str, ...], tuple[str, ...], Convert]]
) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = {}
    for sources, names, convert in links:
        converted |= zip(names, convert(*(tensors[name] for name in sources)), strict=True)
    return converted
