"""The energy head: one sample of the next latent in a single step, from the hidden state and uniform noise."""

import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from calm_core.config.model_config import HeadConfig
from calm_core.model.heads.energy_loss import energy_loss
from calm_core.model.heads.protocol import HeadLoss, Target
from calm_core.model.layers import all_positions, column, layer_norm, linear, own_positions, row
from calm_core.model.noise import Noise


class EnergyHead(MegatronModule):
    """h `[S, B, d]` and noise e ~ U[-1/2, 1/2] -> samples of the next latent `[S, B, N, l]` (paper, section 3.2).

    x = LN(W_e e), c = LN(W_h h), then residual blocks that condition x on c, then a small output network. Inside,
    the N samples of the B sequences stand side by side, `[S, B * N, d]`, as Megatron-core's matrices expect.
    """

    def __init__(self, config: TransformerConfig, head: HeadConfig, latent: int) -> None:
        super().__init__(config=config)
        self.head = head
        d = config.hidden_size
        self.noise_in = linear(config, head.noise, d)
        self.noise_norm = layer_norm(config)
        self.hidden_in = linear(config, d, d)
        self.hidden_norm = layer_norm(config)
        self.blocks = nn.ModuleList(ResidualBlock(config) for _ in range(head.block_count(config.num_layers)))
        self.out_norm = layer_norm(config)
        self.out_expand = column(config, d, d)
        self.out_reduce = row(config, d, latent)
        # At the start every sample is the origin: the first steps find the scale before the spread.
        self.out_reduce.weight.starts_at_zero = True

    def forward(self, hidden: Tensor, noise: Tensor) -> Tensor:
        """Samples `[S, B, N, l]` from hidden states `[S, B, d]` and noise `[S, B, N, e]` in [-1/2, 1/2]."""
        positions, batch, samples, _ = noise.shape
        condition = self.hidden_norm(self.hidden_in(hidden))
        x = self.noise_norm(self.noise_in(noise.to(hidden.dtype).flatten(1, 2)))
        for block in self.blocks:
            x = block(x, condition, samples)
        inner, _ = self.out_expand(self.out_norm(x))
        out, _ = self.out_reduce(F.silu(inner))
        return out.view(positions, batch, samples, -1)

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
        )
        return HeadLoss(energy.loss, {"to_target": energy.to_target, "between": energy.between})

    def sample(self, hidden: Tensor, noise: Noise, samples: int) -> Tensor:
        """`samples` independent latents per position, `[S, B, N, l]`."""
        return self(hidden, self._uniform(noise, all_positions(hidden, self.config), samples))

    def _uniform(self, noise: Noise, positions: int, samples: int) -> Tensor:
        draws = noise.uniform("energy/head", positions, samples, self.head.noise)
        return own_positions(draws - 0.5, self.config)


class ResidualBlock(MegatronModule):
    """x + W_d( silu(g) * u ) with [g, u] = W_3 silu(W_2 silu(W_1 [LN(x), c])).

    W_1 [LN(x), c] = W_1x LN(x) + W_1c c: the second product depends on the position alone, so it is computed once
    per position and not once per sample. Tensor parallelism: W_1 by columns (each half by itself), W_2 by rows, W_3 by
    columns (g and u each split), W_d by rows; the norm is replicated.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        d = config.hidden_size
        self.norm = layer_norm(config)
        self.from_sample = column(config, d, d, bias=False)
        self.from_condition = column(config, d, d)
        self.mix = row(config, d, d)
        self.gate_up = column(config, d, 2 * d)
        self.down = row(config, d, d)

    def forward(self, x: Tensor, condition: Tensor, samples: int) -> Tensor:
        """x `[S, B * N, d]`, condition `[S, B, d]` -> `[S, B * N, d]`."""
        from_sample, _ = self.from_sample(self.norm(x))
        from_condition, _ = self.from_condition(condition)
        inner = F.silu(_add_per_position(from_sample, from_condition, samples))
        inner, _ = self.mix(inner)
        gate, up = self.gate_up(F.silu(inner))[0].chunk(2, dim=-1)
        out, _ = self.down(F.silu(gate) * up)
        return x + out


def _add_per_position(x: Tensor, condition: Tensor, samples: int) -> Tensor:
    """`[S, B * N, d]` + `[S, B, d]`, the second repeated for the N samples of each position."""
    return (x.unflatten(1, (-1, samples)) + condition.unsqueeze(2)).flatten(1, 2)
