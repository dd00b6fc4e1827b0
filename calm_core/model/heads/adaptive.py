"""The network of the diffusion and flow heads: an MLP whose norms are scaled and shifted by time and hidden state."""

import math

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from calm_core.config.model_config import HeadConfig
from calm_core.model.layers import column, layer_norm, linear, row
from calm_core.plan.flops import TIME_FEATURES


class AdaptiveNetwork(MegatronModule):
    """Noisy latents `[S, B, N, l]`, their time and the hidden states `[S, B, d]` -> outputs `[S, B, N, outputs]`.

    Time and hidden state together make the scale, shift and gate of every block (AdaLN, Peebles and Xie 2023): once
    per position, for all the N latents of a position are at the same time.
    """

    def __init__(self, config: TransformerConfig, head: HeadConfig, latent: int, outputs: int) -> None:
        super().__init__(config=config)
        d = config.hidden_size
        self.latent_in = _xavier(linear(config, latent, d), latent, d)
        self.time_in = _xavier(linear(config, TIME_FEATURES, d), TIME_FEATURES, d)
        self.time_out = _xavier(linear(config, d, d), d, d)
        self.hidden_in = _xavier(linear(config, d, d), d, d)
        self.blocks = nn.ModuleList(AdaptiveBlock(config) for _ in range(head.block_count(config.num_layers)))
        self.out_modulation = _zero(linear(config, d, 2 * d))
        self.out = _zero(linear(config, d, outputs))

    def condition(self, hidden: Tensor) -> Tensor:
        """What `forward` wants to know of the hidden states: the same at all times, `[S, B, d]`."""
        return self.hidden_in(hidden)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """x `[S, B, N, l]`, time `[S, B]` or `[1, 1]`, condition `[S, B, d]` -> `[S, B, N, outputs]`, both float32."""
        features = time_features(time, TIME_FEATURES).to(condition.dtype)
        modulation = F.silu(self.time_out(F.silu(self.time_in(features))) + condition)
        h = self.latent_in(x.to(condition.dtype))
        for block in self.blocks:
            h = block(h, modulation)
        shift, scale = self.out_modulation(modulation).unsqueeze(2).chunk(2, dim=-1)
        h = F.layer_norm(h, h.shape[-1:], eps=self.config.layernorm_epsilon)
        return self.out(h * (1 + scale) + shift).float()


class AdaptiveBlock(MegatronModule):
    """x + gate * W_2 silu(W_1 (LN(x) * (1 + scale) + shift)).

    Tensor parallelism: W_1 by columns, W_2 by rows; the norm and the modulation are replicated.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        d = config.hidden_size
        self.norm = layer_norm(config)
        self.modulation = _zero(linear(config, d, 3 * d))
        self.expand = _xavier(column(config, d, d), d, d)
        self.reduce = _xavier(row(config, d, d), d, d)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x `[S, B, N, d]`, modulation `[S, B, d]` -> `[S, B, N, d]`."""
        shift, scale, gate = self.modulation(modulation).unsqueeze(2).chunk(3, dim=-1)
        inner = self.norm(x) * (1 + scale) + shift
        inner, _ = self.expand(inner.flatten(1, 2))
        out, _ = self.reduce(F.silu(inner))
        return x + gate * out.view_as(x)


def time_features(time: Tensor, features: int) -> Tensor:
    """Cosines and sines of `time` `[...]` at frequencies from 1 down to 1/10,000: `[..., features]` float32."""
    half = features // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=time.device, dtype=torch.float32) / half)
    angles = time.unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _xavier(layer: nn.Module, inputs: int, outputs: int) -> nn.Module:
    """Start from N(0, 2 / (inputs + outputs)), by the sizes of the whole matrix."""
    layer.weight.initial_std = math.sqrt(2 / (inputs + outputs))
    return layer


def _zero(layer: nn.Module) -> nn.Module:
    """Start from zero: at first every block passes its input on, and the output is zero."""
    layer.weight.starts_at_zero = True
    return layer
