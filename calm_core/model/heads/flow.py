"""Rectified flow (Liu et al. 2022): straight lines from noise at t = 0 to data at t = 1, and a solver along them."""

from collections.abc import Callable

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from calm_core.config.model_config import HeadConfig
from calm_core.model.heads.adaptive import AdaptiveNetwork
from calm_core.model.heads.protocol import HeadLoss, Target
from calm_core.model.layers import all_positions, own_positions
from calm_core.model.noise import Noise
from calm_core.plan.flops import SAMPLING_EVALUATIONS


def on_the_line(t: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The point (1 - t) source + t target: source and target `[..., l]`, t `[...]` in [0, 1]."""
    t = t.unsqueeze(-1)
    return (1 - t) * source + t * target


def flow_loss(velocity: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Squared error of the velocity `[..., l]` against that of the line, target - source; mean over dimensions."""
    return (velocity - (target - source)).square().mean(-1)


def midpoint(velocity: Callable[[Tensor, float], Tensor], x: Tensor, steps: int) -> Tensor:
    """Solve dx/dt = velocity(x, t) from t = 0 to 1 by the midpoint rule: second order, two evaluations a step."""
    for step in range(steps):
        half = x + velocity(x, step / steps) / (2 * steps)
        x = x + velocity(half, (2 * step + 1) / (2 * steps)) / steps
    return x


TIME_SCALE = 1000  # the network is told whole thousandths of the way from noise to data


class FlowHead(MegatronModule):
    """Learns the velocity of lines from noise to latents; samples by the midpoint rule."""

    def __init__(self, config: TransformerConfig, head: HeadConfig, latent: int) -> None:
        super().__init__(config=config)
        self.latent = latent
        self.net = AdaptiveNetwork(config, head, latent, latent)

    def loss(self, hidden: Tensor, target: Target, noise: Noise) -> HeadLoss:
        """Squared error of the velocity, at one random time for one draw of the posterior per position."""
        positions = target.tokens.shape[0]
        t = own_positions(noise.uniform("flow/time", positions), self.config)
        source = own_positions(noise.normal("flow/source", positions, self.latent), self.config)
        end = own_positions(target.latent(noise.normal("flow/target", positions, self.latent)), self.config)
        x = on_the_line(t, source, end)
        velocity = self.net(x.unsqueeze(2), (t * TIME_SCALE).floor(), self.net.condition(hidden)).squeeze(2)
        return HeadLoss(flow_loss(velocity, source, end), {})

    def sample(self, hidden: Tensor, noise: Noise, samples: int) -> Tensor:
        """`samples` independent latents per position, `[S, B, N, l]`."""
        positions = all_positions(hidden, self.config)
        source = own_positions(noise.normal("flow/start", positions, samples, self.latent), self.config)
        condition = self.net.condition(hidden)

        def velocity(x: Tensor, t: float) -> Tensor:
            time = torch.full((1, 1), t * TIME_SCALE, device=x.device).floor()
            return self.net(x, time, condition)

        return midpoint(velocity, source, SAMPLING_EVALUATIONS["flow"] // 2)
