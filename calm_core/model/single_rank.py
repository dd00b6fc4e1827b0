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
from calm_core.model.attention import KeyValueCache, RotaryAngles, causal_attention, rotated_heads, rotation
from calm_core.model.pointwise import swiglu


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
    bias_activation_fusion: bool = False

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
        turns = rotation(self.rope, positions, cache, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, turns, cache)
        if cache is not None:
            cache.advance(positions)
        return self.final_layernorm(hidden)


class Layer(nn.Module):
    """Pre-norm attention and feed-forward network, each added to the residual stream."""

    def __init__(self, config: SingleRank, backbone: BackboneConfig, number: int) -> None:
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attention = Attention(config, backbone, number)
        self.pre_mlp_layernorm = _norm(config)
        self.mlp = FeedForward(config, backbone.ffn)

    def forward(self, x: Tensor, turns: Tensor, cache: KeyValueCache | None) -> Tensor:
        """`[S, B, d]` -> `[S, B, d]`."""
        x = x + self.self_attention(self.input_layernorm(x), turns, cache)
        return x + self.mlp(self.pre_mlp_layernorm(x))


class Attention(nn.Module):
    """Grouped-query self-attention with rotary position embedding; `rotated_heads` has the order of the rows."""

    def __init__(self, config: SingleRank, backbone: BackboneConfig, number: int) -> None:
        super().__init__()
        d, self.number = backbone.hidden, number
        self.groups = backbone.key_value_heads
        rows = (backbone.heads + 2 * self.groups) * (d // backbone.heads)
        self.linear_qkv = Linear(d, rows, config.params_dtype, bias=False)
        self.linear_proj = Linear(d, d, config.params_dtype, bias=False)

    def forward(self, x: Tensor, turns: Tensor, cache: KeyValueCache | None) -> Tensor:
        """`[S, B, d]` -> `[S, B, d]`."""
        query, key, value = rotated_heads(self.linear_qkv(x)[0], turns, self.groups)
        return self.linear_proj(causal_attention(query, key, value, self.number, cache))[0]


class FeedForward(nn.Module):
    """SwiGLU; `linear_fc1` holds the gate's rows and below them those of the up projection."""

    def __init__(self, config: SingleRank, ffn: int) -> None:
        super().__init__()
        self.linear_fc1 = Linear(config.hidden_size, 2 * ffn, config.params_dtype, bias=False)
        self.linear_fc2 = Linear(ffn, config.hidden_size, config.params_dtype, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[S, B, d]` -> `[S, B, d]`."""
        return self.linear_fc2(swiglu(self.linear_fc1(x)[0]))[0]


def embedding(rows: int, width: int, dtype: torch.dtype) -> nn.Embedding:
    """An embedding table whose weights are left uninitialised."""
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width, dtype=dtype))


def _norm(config: SingleRank) -> nn.RMSNorm:
    return nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon, dtype=config.params_dtype)
