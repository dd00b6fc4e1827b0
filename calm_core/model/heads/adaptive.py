"""The network of the diffusion and flow heads: an MLP whose norms are scaled and shifted by time and hidden state."""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_core.config.model_config import HeadConfig, ModelShape
from calm_core.model import costs as of
from calm_core.model.costs import Activations, HeadCosts, Kernels, Load, target_bytes
from calm_core.model.layers import column, layer_norm, linear, row
from calm_core.model.pointwise import add_bias, fused, silu

if TYPE_CHECKING:
    from calm_core.megatron import TransformerConfig

TIME_FEATURES = 256  # sinusoidal features of the time

TIME_STD = 0.02  # of the initial weights that read the time, as in the reference


class AdaptiveNetwork(nn.Module):
    """Noisy latents `[S, B, N, l]`, their times and the hidden states `[S, B, d]` -> outputs `[S, B, N, outputs]`.

    Time and hidden state together give the scale, shift and gate of every block (AdaLN, Peebles and Xie 2023).
    """

    def __init__(self, config: "TransformerConfig", head: HeadConfig, latent: int, outputs: int) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        d = config.hidden_size
        self.latent_in = _xavier(linear(config, latent, d), latent, d)
        self.time_in = _normal(linear(config, TIME_FEATURES, d), TIME_STD)
        self.time_out = _normal(linear(config, d, d), TIME_STD)
        self.hidden_in = _xavier(linear(config, d, d), d, d)
        self.blocks = nn.ModuleList(AdaptiveBlock(config) for _ in range(head.block_count(config.num_layers)))
        self.out_modulation = _zero(linear(config, d, 2 * d))
        self.out = _zero(linear(config, d, outputs))

    def condition(self, hidden: Tensor) -> Tensor:
        """The part of the network that reads the hidden states and not the time, `[S, B, d]`."""
        return self.hidden_in(hidden)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """x `[S, B, N, l]` at times `[S, B, N]`, or `[1, 1, 1]` for all, condition `[S, B, d]` -> `[S, B, N, outputs]`.

        x and the output are float32. At one time for all, the modulation is computed once per position.
        """
        features = time_features(time, TIME_FEATURES).to(condition.dtype)
        modulation = F.silu(self.time_out(F.silu(self.time_in(features))) + condition.unsqueeze(2))
        h = self.latent_in(x.to(condition.dtype))
        for block in self.blocks:
            h = block(h, modulation)
        shift, scale = self.out_modulation(modulation).chunk(2, dim=-1)
        h = F.layer_norm(h, h.shape[-1:], eps=self.eps)
        return self.out(h * (1 + scale) + shift).float()


class AdaptiveBlock(nn.Module):
    """x + gate * W_2 silu(W_1 (LN(x) * (1 + scale) + shift)).

    Tensor parallelism: W_1 by columns, W_2 by rows; every rank holds the norm and the modulation whole.
    """

    def __init__(self, config: "TransformerConfig") -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.norm = layer_norm(config)
        self.modulation = _zero(linear(config, d, 3 * d))
        self.expand = _xavier(column(config, d, d), d, d)
        self.reduce = _xavier(row(config, d, d), d, d)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x `[S, B, N, d]`, modulation `[S, B, N, d]` or `[S, B, 1, d]` -> `[S, B, N, d]`."""
        shift, scale, gate = self.modulation(modulation).chunk(3, dim=-1)
        norm = self.norm
        inner = fused(self, _modulated_norm)(x, norm.weight, norm.bias, norm.eps, shift, scale)
        inner = fused(self, silu)(*self.expand(inner.flatten(1, 2)))
        return fused(self, _gated_sum)(x, gate, *self.reduce(inner))


def _modulated_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) * (1 + scale) + shift, `[S, B, N, d]`."""
    return F.layer_norm(x, weight.shape, weight, bias, eps) * (1 + scale) + shift


def _gated_sum(x: Tensor, gate: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """x + gate * (y + bias): x `[S, B, N, d]`, y `[S, B * N, d]` -> `[S, B, N, d]`."""
    return x + gate * add_bias(y, bias).view_as(x)


def time_features(time: Tensor, features: int) -> Tensor:
    """Cosines and sines of `time` `[...]` at frequencies from 1 down to 1/10,000: `[..., features]` float32."""
    half = features // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=time.device, dtype=torch.float32) / half)
    angles = time.unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def costs(shape: ModelShape, outputs: int, sampling_evaluations: int) -> HeadCosts:
    """Costs of a head on this network: the hidden state's layer once per position, the rest once per evaluation."""
    d, blocks = shape.backbone.hidden, shape.head.block_count(shape.backbone.layers)
    block = of.linear(d, 3 * d) + of.layer_norm(d) + of.column(d, d) + of.row(d, d)
    modulation = of.leaf_linear(TIME_FEATURES, d) + of.linear(d, d)
    latents = of.leaf_linear(shape.latent, d) + block * blocks + of.linear(d, 2 * d) + of.linear(d, outputs)
    return HeadCosts(
        per_position=of.linear(d, d),
        per_evaluation=modulation + latents,
        training_evaluations=shape.head.samples,
        sampling_evaluations=sampling_evaluations,
    )


def kernels(shape: ModelShape, load: Load, outputs: int, loss: Kernels) -> Kernels:
    """Of the final norm, this network on N = `head.samples` latents per position, and a loss of kernels `loss`."""
    d, blocks = shape.backbone.hidden, shape.head.block_count(shape.backbone.layers)
    n = shape.head.samples
    whole, wide, narrow = load.whole(d), load.whole(n * d), load.split(n * d)
    modulated = of.layer_norm_kernel(wide) + of.pointwise(8 * wide, 6 * wide, kernels=(3, 2))
    gated = of.bias_kernel(wide) + of.pointwise(6 * wide, 6 * wide, kernels=(2, 2))
    block = (
        of.linear_product(load, d, 3 * d, n)
        + of.pointwise(0, 3 * wide)  # the bias's gradient
        + of.fused(load, 4 * wide, 6 * wide, modulated)  # LN(x) * (1 + scale) + shift
        + of.column_product(load, d, d, n)
        + of.silu_kernel(load, narrow)
        + of.row_product(load, d, d, n)
        + of.fused(load, 4 * wide, 5 * wide, gated)  # x + gate * out
        + of.pointwise(0, 3 * wide)  # the gradients of x add up
        + of.pointwise(0, 9 * wide, kernels=(0, 2))  # gradients of shift, scale and gate; of the modulation
    )
    draws = of.noise_kernels(load, load.positions * n) + of.noise_kernels(load, load.positions * n * shape.latent) * 2
    latents = of.conversion(load, n * shape.latent, 0) + of.conversion(load, n * shape.latent)
    features = of.pointwise(5 * load.float32(n * TIME_FEATURES), 0, (8, 0)) + of.conversion(load, n * TIME_FEATURES, 0)
    time = features + of.linear_product(load, TIME_FEATURES, d, n, leaf=True) + of.pointwise(2 * wide, 3 * wide)
    condition = of.linear_product(load, d, d, n) + of.linear_product(load, d, d)
    condition += of.pointwise(2 * wide + whole, 4 * wide + whole, kernels=(1, 4))
    silu = of.pointwise(2 * wide, 3 * wide)
    first = of.linear_product(load, shape.latent, d, n, leaf=True)
    last = of.linear_product(load, d, 2 * d, n) + of.linear_product(load, d, outputs, n)
    ends = first + last + modulated + silu
    biases = of.pointwise(0, 4 * wide, kernels=(0, 3))
    network = time + condition + block * blocks + ends + biases
    return of.rms_norm_kernels(load, d) + draws + latents + network + loss


def activations(shape: ModelShape, load: Load, loss: int) -> Activations:
    """Of the final norm, this network on N = `head.samples` latents per position, and a loss that keeps `loss` bytes.

    Kept per position: what the final norm keeps; the hidden state, read by its layer.

    Kept per latent:
    - the features of the time and the latent, read by their layers;
    - d wide and whole: the time's hidden layer before and after SiLU, and the modulation before and after SiLU;
    - in each block, d wide and whole: its input, read by LN; LN(x) and 1 + scale, read by their product; the modulated
      x, read by W_1; the output of W_2, read by the product with the gate; and shift, scale and gate, three in one
      tensor of which the gate is a view;
    - in each block, d wide and split: the hidden layer before and after SiLU;
    - in the output, d wide and whole: the last block's output, read by LN; LN(x) and 1 + scale, read by their product;
      and the modulated x, read by the last layer.

    Alive in addition in the backward pass: the gradients of the shift, scale and gate of a block in one tensor.
    """
    d, blocks = shape.backbone.hidden, shape.head.block_count(shape.backbone.layers)
    n = shape.head.samples
    per_position = load.rms_norm(d) + load.whole(d)
    inputs = load.whole(n * (TIME_FEATURES + shape.latent))
    network = (4 + 8 * blocks + 4) * load.whole(n * d) + 2 * blocks * load.split(n * d)
    kept = per_position + inputs + network + loss + target_bytes(shape, load)
    return Activations(kept, backward=3 * load.whole(n * d), gathered=load.gathered(n * d))


def _xavier(layer: nn.Module, inputs: int, outputs: int) -> nn.Module:
    """Start from N(0, 2 / (inputs + outputs)), by the sizes of the whole matrix."""
    return _normal(layer, math.sqrt(2 / (inputs + outputs)))


def _normal(layer: nn.Module, std: float) -> nn.Module:
    """Start from N(0, std^2)."""
    layer.weight.initial_std = std
    return layer


def _zero(layer: nn.Module) -> nn.Module:
    """Start from zero: at first every block returns its input, and the output is zero."""
    layer.weight.starts_at_zero = True
    return layer
