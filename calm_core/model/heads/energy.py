"""The energy head: one sample of the next latent in a single step, from the hidden state and uniform noise."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from calm_core.config.model_config import HeadConfig, ModelShape
from calm_core.model import costs as of
from calm_core.model.costs import FLOAT32, Activations, HeadCosts, Kernels, Load, Product, target_bytes
from calm_core.model.heads import HeadLoss, Target
from calm_core.model.heads.energy_loss import DISTANCES_AT_ONCE, energy_loss
from calm_core.model.layers import all_positions, column, layer_norm, linear, own_layers, own_positions, row
from calm_core.model.noise import Noise
from calm_core.model.pointwise import add_bias, add_layer_norm, fused, fuses, silu, silu_per_position, swiglu

if TYPE_CHECKING:
    from calm_core.megatron import TransformerConfig


class EnergyHead(nn.Module):
    """h `[S, B, d]` and noise e ~ U[-1/2, 1/2] -> samples of the next latent `[S, B, N, l]` (paper, section 3.2).

    x = LN(W_e e), c = LN(W_h h), then residual blocks that condition x on c, then a small output network. Inside,
    the N samples of the B sequences are one dimension, `[S, B * N, d]`, as Megatron-core's matrices expect.
    """

    def __init__(self, config: "TransformerConfig", head: HeadConfig, latent: int) -> None:
        super().__init__()
        self.config, self.head = config, head
        d = config.hidden_size
        self.noise_in = linear(config, head.noise, d)
        self.noise_norm = layer_norm(config)
        self.hidden_in = linear(config, d, d)
        self.hidden_norm = layer_norm(config)
        self.blocks = nn.ModuleList(ResidualBlock(config) for _ in range(head.block_count(config.num_layers)))
        self.out_norm = layer_norm(config)
        self.out_expand = column(config, d, d)
        self.out_reduce = row(config, d, latent)
        # At the start every sample is the origin: the first steps learn the scale before the spread.
        self.out_reduce.weight.starts_at_zero = True

    def forward(self, hidden: Tensor, noise: Tensor) -> Tensor:
        """Samples `[S, B, N, l]` from hidden states `[S, B, d]` and noise `[S, B, N, e]` in [-1/2, 1/2]."""
        positions, batch, samples, _ = noise.shape
        condition = self.hidden_norm(self.hidden_in(hidden))
        x = self.noise_norm(self.noise_in(noise.to(hidden.dtype).flatten(1, 2)))
        norms = [*(block.norm for block in self.blocks), self.out_norm]
        normed = norms[0](x)
        for block, norm in zip(self.blocks, norms[1:], strict=True):
            x, normed = fused(self, add_layer_norm)(
                x, *block(normed, condition, samples), norm.weight, norm.bias, norm.eps
            )
        inner = fused(self, silu)(*self.out_expand(normed))
        return add_bias(*self.out_reduce(inner)).view(positions, batch, samples, -1)

    def loss(self, hidden: Tensor, target: Target, noise: Noise) -> HeadLoss:
        """The energy loss of `head.samples` draws against `head.target_samples` draws of the posterior."""
        head = self.head
        positions = target.tokens.shape[0]
        samples = self(hidden, self._uniform(noise, positions, head.samples))
        groups = -(-positions // head.target_group)
        target_noise = noise.normal("energy/target", groups, head.target_samples, target.mean.shape[-1])
        energy = energy_loss(
            samples,
            own_positions(target.mean, self.config),
            own_positions(target.log_std, self.config),
            own_positions(target_noise, self.config),
            beta=head.beta,
            fuse=fuses(self),
        )
        return HeadLoss(energy.loss, {"to_target": energy.to_target, "between": energy.between})

    def sample(self, hidden: Tensor, noise: Noise, samples: int) -> Tensor:
        """`samples` independent latents per position, `[S, B, N, l]`."""
        return self(hidden, self._uniform(noise, all_positions(hidden, self.config), samples))

    def _uniform(self, noise: Noise, positions: int, samples: int) -> Tensor:
        draws = noise.uniform("energy/head", positions, samples, self.head.noise)
        return own_positions(draws - 0.5, self.config)


class ResidualBlock(nn.Module):
    """x + W_d( silu(g) * u ) with [g, u] = W_3 silu(W_2 silu(W_1 [LN(x), c])).

    W_1 [LN(x), c] = W_1x LN(x) + W_1c c: the second product depends on the position alone, so it is computed once
    per position and not once per sample. Tensor parallelism: W_1 by columns (each half separately), W_2 by rows, W_3 by
    columns (g and u each split), W_d by rows; every rank holds the norm whole. The head computes LN(x) and the sum, as
    the sum of one block and the norm of the next are one function.
    """

    def __init__(self, config: "TransformerConfig") -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.norm = layer_norm(config)
        self.from_sample = column(config, d, d, bias=False)
        self.from_condition = column(config, d, d)
        self.mix = row(config, d, d)
        self.gate_up = column(config, d, 2 * d)
        self.down = row(config, d, d)

    def forward(self, normed: Tensor, condition: Tensor, samples: int) -> tuple[Tensor, Tensor | None]:
        """LN(x) `[S, B * N, d]` and condition `[S, B, d]` -> W_d(...) `[S, B * N, d]`, and a bias that is not added."""
        from_sample, _ = self.from_sample(normed)
        inner = fused(self, silu_per_position)(from_sample, *self.from_condition(condition), samples)
        inner = fused(self, silu)(*self.mix(inner))
        return self.down(fused(self, swiglu)(*self.gate_up(inner)))


def build(config: "TransformerConfig", shape: ModelShape) -> EnergyHead:
    """The head of a model of this shape."""
    return EnergyHead(own_layers(config), shape.head, shape.latent)


def costs(shape: ModelShape) -> HeadCosts:
    """Conditioning once per position, the rest once per sample: N in training, one per draw in sampling.

    The loss computes products of N samples and one spread per position with the M target draws; in training also the
    gradient of the samples, which takes one more product for each sample.
    """
    d, head, blocks = shape.backbone.hidden, shape.head, shape.head.block_count(shape.backbone.layers)
    block = of.layer_norm(d) + of.column(d, d, bias=False) + of.row(d, d) + of.column(d, 2 * d) + of.row(d, d)
    entrance = of.leaf_linear(head.noise, d) + of.layer_norm(d)
    output = of.layer_norm(d) + of.column(d, d) + of.row(d, shape.latent)
    product = 2 * head.target_samples * shape.latent
    return HeadCosts(
        per_position=of.linear(d, d) + of.layer_norm(d) + of.column(d, d) * blocks,
        per_evaluation=entrance + block * blocks + output,
        training_evaluations=head.samples,
        loss_forward=product * (head.samples + 1),
        loss_training=product * (2 * head.samples + 1),
        shared_positions=head.target_group,
    )


def kernels(shape: ModelShape, load: Load) -> Kernels:
    """Of the final norm, the head on N samples per position, and the energy loss, in the order of the forward pass."""
    d, head = shape.backbone.hidden, shape.head
    n, blocks = head.samples, head.block_count(shape.backbone.layers)
    whole, wide, split, narrow = load.whole(d), load.whole(n * d), load.split(d), load.split(n * d)
    joined = of.pointwise(2 * narrow + split, narrow + split)  # the halves of W_1; backward sums over the samples
    summed = of.bias_kernel(wide) + of.pointwise(3 * wide, 3 * wide)  # the residual
    block = (
        of.column_product(load, d, d, n)
        + of.column_product(load, d, d)
        + of.fused(
            load,
            2 * narrow + split,
            3 * narrow + split,
            of.bias_kernel(split) + joined + of.silu_kernel(load, narrow, biased=False),
        )
        + of.row_product(load, d, d, n)
        + of.silu_kernel(load, wide)
        + of.column_product(load, d, 2 * d, n)
        + of.swiglu_kernels(load, narrow)
        + of.row_product(load, d, d, n)
        + of.fused(load, 4 * wide, 4 * wide, summed + of.layer_norm_kernel(wide))
        + of.pointwise(0, 3 * whole)  # the gradients of the condition add up
    )
    entrance = (
        of.noise_kernels(load, load.positions * n * head.noise)
        + of.pointwise(2 * FLOAT32 * load.rows * n * head.noise, 0)  # to [-1/2, 1/2]
        + of.conversion(load, n * head.noise, 0)
        + of.linear_product(load, head.noise, d, n, leaf=True)
        + of.linear_product(load, d, d)
        + of.pointwise(0, wide)  # biases: added by the products, summed by kernels of their own
        + of.pointwise(0, whole)
        + of.layer_norm_kernel(wide)
        + of.layer_norm_kernel(whole)
    )
    latent = load.whole(n * shape.latent)
    output = (
        of.layer_norm_kernel(wide)
        + of.column_product(load, d, d, n)
        + of.silu_kernel(load, narrow)
        + of.row_product(load, d, shape.latent, n)
        + of.bias_kernel(latent)
    )
    return of.rms_norm_kernels(load, d) + entrance + block * blocks + output + _loss_kernels(shape, load)


def _loss_kernels(shape: ModelShape, load: Load) -> Kernels:
    """Of the target draws and the energy loss, which computes its gradient in the forward pass.

    In every slice of the positions the distances to the targets are read or written 16 times, and for each offset
    between two samples their differences 13 times; compiled, the distances 4 times and the differences never. Products
    are in float32, with a matrix of draws for every `target_group` positions.
    """
    n, m, latent = shape.head.samples, shape.head.target_samples, shape.latent
    distances = load.own_rows * n * m
    slices = -(-distances // DISTANCES_AT_ONCE[load.device])
    pairs = load.own_rows * n * (n - 1) // 2 * latent
    if load.compiled:
        moved, started = FLOAT32 * 4 * distances + 12 * load.float32(n * latent), (5 + 10 * slices, 4)
    else:
        moved = FLOAT32 * (16 * distances + 13 * pairs) + 24 * load.float32(n * latent)
        started = 5 + slices * (30 + 14 * (n - 1)), 4
    draws = -(-load.positions // shape.head.target_group) * m * latent
    loss = of.pointwise(moved, 2 * load.float32(n * latent), kernels=started)
    runs = -(-load.own_rows // shape.head.target_group)
    spread, inner = (Product.of(FLOAT32, load.own_rows * uses, latent, m, runs) for uses in (1, n))
    products = Kernels(products_forward=(spread, inner), products_backward=(inner,))
    return of.noise_kernels(load, draws) + of.conversion(load, n * latent) + loss + products


def activations(shape: ModelShape, load: Load) -> Activations:
    """Of the final norm, the head on N samples per position, and the energy loss.

    Kept per position, d wide and whole: what the final norm keeps; the hidden state, read by W_h; its output, read by
    LN; and the condition c, read by every W_1c.

    Kept per sample:
    - the noise, read by W_e: the float32 draws of all positions, or with bf16 weights a copy of the own positions';
    - d wide and whole: the output of W_e, read by LN; the last block's output, read by LN; and its norm, read by the
      output network's first matrix;
    - in each block, d wide and whole: its input x, read by LN; LN(x), read by W_1x; the output of W_2, read by SiLU;
      and the result, read by W_3;
    - in each block, d wide and split: the sum of W_1's halves, read by SiLU; the result, read by W_2; g, u and, unless
      compiled, silu(g), read by SiLU and the product; and the product, read by W_d;
    - in the output network, d wide and split: the hidden layer before and after SiLU;
    - the gradient of the sample in float32, which the loss computes in its forward pass.

    Alive in addition in the forward pass: the samples themselves, the target draws in float32, and the distances of one
    slice of the loss in three copies (squares, distances, slopes). In the backward pass: the scaled gradient of the
    samples, and the gradients of a block's input and output.
    """
    d, head, latent = shape.backbone.hidden, shape.head, shape.latent
    n, blocks = head.samples, head.block_count(shape.backbone.layers)
    per_position = load.rms_norm(d) + 3 * load.whole(d)
    noise = load.whole(n * head.noise) if load.width < FLOAT32 else load.rows * n * head.noise * FLOAT32
    split = 2 + (5 if load.compiled else 6) * blocks
    per_sample = (3 + 4 * blocks) * load.whole(n * d) + split * load.split(n * d)
    gradient = load.float32(n * latent)
    groups = load.micro_batch * -(-load.positions // head.target_group)
    draws = groups * head.target_samples * latent * FLOAT32
    distances = FLOAT32 * min(DISTANCES_AT_ONCE[load.device], load.own_rows * n * head.target_samples)
    return Activations(
        kept=per_position + noise + per_sample + gradient + target_bytes(shape, load),
        forward=load.whole(n * latent) + draws + 3 * distances,
        backward=gradient + 2 * load.whole(n * d),
        gathered=load.gathered(n * d),
    )
