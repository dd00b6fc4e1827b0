"""Faster forward passes of a frozen model on a single rank, for generation.

Megatron-core's layers do work for gradients and for communication. With one position at a time that takes longer than
the matrix products themselves.
"""

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from calm_core.model.backbone import Backbone
from calm_core.model.cache import KeyValueCache


def run_directly(model: nn.Module) -> None:
    """Make the forward passes of the parallel matrices plain products, and that of the backbone a plain loop."""
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.forward = partial(_product, module)
        elif isinstance(module, Backbone):
            module.forward = partial(_backbone, module)


def _product(
    matrix: ColumnParallelLinear | RowParallelLinear, x: Tensor, *_: object, **__: object
) -> tuple[Tensor, Tensor | None]:
    """The output of the matrix, and the bias if its caller adds it (`skip_bias_add`)."""
    deferred = matrix.bias if matrix.skip_bias_add else None
    return F.linear(x, matrix.weight, None if matrix.skip_bias_add else matrix.bias), deferred


def _backbone(backbone: Backbone, hidden: Tensor, cache: KeyValueCache | None = None) -> Tensor:
    """As `Backbone.forward`: `[S, B, d]` -> `[S, B, d]`."""
    positions = hidden.shape[0]
    angles = cache.rotary(backbone.rope, positions) if cache else backbone.rope(positions)
    rotation = angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)  # once, not in each layer
    for layer in backbone.layers:
        layer.self_attention.core_attention.cache = cache
        hidden = hidden + _attention(layer.self_attention, layer.input_layernorm(hidden), rotation)
        hidden = hidden + _feed_forward(layer.mlp, layer.pre_mlp_layernorm(hidden))
    if cache is not None:
        cache.advance(positions)
    return backbone.final_layernorm(hidden)


def _attention(attention: SelfAttention, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Self-attention; the joint matrix gives, group by group, the queries of the group, then its key and its value."""
    width = attention.hidden_size_per_attention_head
    groups = attention.num_query_groups_per_partition
    heads = attention.num_attention_heads_per_partition
    grouped = F.linear(x, attention.linear_qkv.weight).unflatten(-1, (groups, -1, width))
    query, key, value = grouped.split([heads // groups, 1, 1], dim=-2)
    query, key = (_rotated(each.flatten(2, 3), *rotation) for each in (query, key))
    out = attention.core_attention(query, key, value.flatten(2, 3))
    return F.linear(out, attention.linear_proj.weight)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `[S, B, heads, width]` by the angles of `[S, 1, 1, width]`, whose halves are equal."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _feed_forward(mlp: MLP, x: Tensor) -> Tensor:
    gate, up = F.linear(x, mlp.linear_fc1.weight).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, mlp.linear_fc2.weight)
