"""Rectified flow (Liu et al. 2022): straight lines from noise at t = 0 to data at t = 1, and a solver along them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from calm_core.config.model_config import HeadConfig, ModelShape
from calm_core.model.costs import Activations, HeadCosts, Kernels, Load, pointwise
from calm_core.model.heads import HeadLoss, Target, adaptive
from calm_core.model.heads.adaptive import AdaptiveNetwork
from calm_core.model.layers import all_positions, own_positions
from calm_core.model.noise import Noise

if TYPE_CHECKING:
    from calm_core.megatron import TransformerConfig

TIME_SCALE = 1000  # the network reads time in whole thousandths of the line

MIDPOINT_STEPS = 10  # of two evaluations each


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


class FlowHead(nn.Module):
    """Learns the velocity of lines from noise to latents; samples by the midpoint rule."""

    def __init__(self, config: "TransformerConfig", head: HeadConfig, latent: int) -> None:
        super().__init__()
        self.config, self.latent, self.samples = config, latent, head.samples
        self.net = AdaptiveNetwork(config, head, latent, latent)

    def loss(self, hidden: Tensor, target: Target, noise: Noise) -> HeadLoss:
        """Squared error of the velocity, the mean over `head.samples` lines per position.

        Each line has its own time, its own noise and its own draw of the posterior.
        """
        draws = target.tokens.shape[0], self.samples
        t = own_positions(noise.uniform("flow/time", *draws), self.config)
        source = own_positions(noise.normal("flow/source", *draws, self.latent), self.config)
        end = own_positions(target.latents(noise.normal("flow/target", *draws, self.latent)), self.config)
        x = on_the_line(t, source, end)
        velocity = self.net(x, (t * TIME_SCALE).floor(), self.net.condition(hidden))
        return HeadLoss(flow_loss(velocity, source, end).mean(-1), {})

    def sample(self, hidden: Tensor, noise: Noise, samples: int) -> Tensor:
        """`samples` independent latents per position, `[S, B, N, l]`."""
        positions = all_positions(hidden, self.config)
        source = own_positions(noise.normal("flow/start", positions, samples, self.latent), self.config)
        condition = self.net.condition(hidden)

        def velocity(x: Tensor, t: float) -> Tensor:
            time = torch.full((1, 1, 1), t * TIME_SCALE, device=x.device).floor()
            return self.net(x, time, condition)

        return midpoint(velocity, source, MIDPOINT_STEPS)


def build(config: "TransformerConfig", shape: ModelShape) -> FlowHead:
    """The head of a model of this shape."""
    return FlowHead(config, shape.head, shape.latent)


def costs(shape: ModelShape) -> HeadCosts:
    """One evaluation of the network per line in training, two per step of the solver in sampling."""
    return adaptive.costs(shape, outputs=shape.latent, sampling_evaluations=2 * MIDPOINT_STEPS)


def kernels(shape: ModelShape, load: Load) -> Kernels:
    """Of the final norm, the network and its loss: the line, its noise and target, and the squared error."""
    size = load.float32(shape.head.samples * shape.latent)
    return adaptive.kernels(shape, load, outputs=shape.latent, loss=pointwise(24 * size, 8 * size, kernels=(13, 8)))


def activations(shape: ModelShape, load: Load) -> Activations:
    """Of the final norm, the network and its loss; of the loss the float32 error of the velocity is kept."""
    return adaptive.activations(shape, load, loss=load.float32(shape.head.samples * shape.latent))
