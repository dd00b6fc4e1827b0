"""The network held whole by one process, for inference: plain torch, without Megatron-core or process groups.

Given a `SingleRank` instead of Megatron-core's configuration, `CalmModel` is built from the layers of this module. Its
parameters have the same names, shapes and meaning, so that it loads the checkpoints that training saves. It also needs
less time: what Megatron-core does for gradients and other ranks costs more than the products of a single position.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_core.config.model_config import BackboneConfig
from calm_core.model.attention import causal_attention
from calm_core.model.cache import KeyValueCache


@dataclass(frozen=True)
class SingleRank:
    """What layers and heads ask of a configuration, under the names of Megatron-core's `TransformerConfig`."""

    hidden_size: int
    num_layers: int
    layernorm_epsilon: float
    params_dtype: torch.dtype = torch.float32
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    sequence_parallel: bool = False

    @classmethod
    def of(cls, backbone: BackboneConfig, dtype: torch.dtype = torch.float32) -> "SingleRank":
        """For a model with this backbone and weights in `dtype`."""
        return cls(backbone.hidden, backbone.layers, backbone.norm_eps, dtype)


class Linear(nn.Module):
    """A linear layer that returns its output and, like Megatron-core's, a bias left to the caller: None."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> None:
        """The weights are left uninitialised: they are loaded, or drawn by `parameters.initialize`."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """`[..., inputs]` -> `[..., outputs]`."""
        return F.linear(x, self.weight, self.bias), None


class SingleRankBackbone(nn.Module):
    """The causal transformer: `model.backbone` without Megatron-core."""

    def __init__(self, config: SingleRank, backbone: BackboneConfig) -> None:
        super().__init__()
        self.rope = RotaryAngles(backbone.hidden // backbone.heads, backbone.rope_base)
        self.layers = nn.ModuleList(Layer(config, backbone, number) for number in range(backbone.layers))
        self.final_layernorm = _norm(config)

    def forward(self, hidden: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Hidden states `[S, B, d]` -> `[S, B, d]`. With a cache, the positions follow those in it."""
        positions = hidden.shape[0]
        angles = cache.rotary(self.rope, positions) if cache is not None else self.rope(positions)
        rotation = angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, rotation, cache)
        if cache is not None:
            cache.advance(positions)
        return self.final_layernorm(hidden)


class RotaryAngles(nn.Module):
    """The angles by which rotary position embedding turns the pairs of a head's dimensions."""

    def __init__(self, width: int, base: float) -> None:
        super().__init__()
        frequencies = 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: int, offset: int = 0) -> Tensor:
        """Angles `[positions, 1, 1, width]` from position `offset` on; both halves of the width are equal."""
        numbers = torch.arange(positions, device=self.frequencies.device, dtype=torch.float32) + offset
        angles = torch.outer(numbers, self.frequencies)
        return torch.cat([angles, angles], dim=-1)[:, None, None]


class Layer(nn.Module):
    """Pre-norm attention and feed-forward network, each added to the residual stream."""

    def __init__(self, config: SingleRank, backbone: BackboneConfig, number: int) -> None:
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attention = Attention(config, backbone, number)
        self.pre_mlp_layernorm = _norm(config)
        self.mlp = FeedForward(config, backbone.ffn)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KeyValueCache | None) -> Tensor:
        """`[S, B, d]` -> `[S, B, d]`."""
        x = x + self.self_attention(self.input_layernorm(x), rotation, cache)
        return x + self.mlp(self.pre_mlp_layernorm(x))


class Attention(nn.Module):
    """Grouped-query self-attention with rotary position embedding.

    In `linear_qkv` the rows of a group lie together: its queries first, then its key and its value.
    """

    def __init__(self, config: SingleRank, backbone: BackboneConfig, number: int) -> None:
        super().__init__()
        d, self.number = backbone.hidden, number
        self.width, self.groups = d // backbone.heads, backbone.key_value_heads
        self.queries = backbone.heads // self.groups  # of a group
        rows = self.groups * (self.queries + 2) * self.width
        self.linear_qkv = Linear(d, rows, config.params_dtype, bias=False)
        self.linear_proj = Linear(d, d, config.params_dtype, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KeyValueCache | None) -> Tensor:
        """`[S, B, d]` -> `[S, B, d]`."""
        grouped = self.linear_qkv(x)[0].unflatten(-1, (self.groups, -1, self.width))
        query, key, value = (part.flatten(2, 3) for part in grouped.split([self.queries, 1, 1], dim=-2))
        query, key = _rotated(query, *rotation), _rotated(key, *rotation)
        return self.linear_proj(causal_attention(query, key, value, self.number, cache))[0]


class FeedForward(nn.Module):
    """SwiGLU; `linear_fc1` holds the gate's rows and below them those of the up projection."""

    def __init__(self, config: SingleRank, ffn: int) -> None:
        super().__init__()
        self.linear_fc1 = Linear(config.hidden_size, 2 * ffn, config.params_dtype, bias=False)
        self.linear_fc2 = Linear(ffn, config.hidden_size, config.params_dtype, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[S, B, d]` -> `[S, B, d]`."""
        gate, up = self.linear_fc1(x)[0].chunk(2, dim=-1)
        return self.linear_fc2(F.silu(gate) * up)[0]


def embedding(rows: int, width: int, dtype: torch.dtype) -> nn.Embedding:
    """An embedding table whose weights are left uninitialised."""
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width, dtype=dtype))


def _norm(config: SingleRank) -> nn.RMSNorm:
    return nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon, dtype=config.params_dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `[S, B, heads, width]`; cos and sin `[S, 1, 1, width]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
