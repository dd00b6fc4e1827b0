"""Denoising diffusion (Ho et al. 2020) with learned variances and the hybrid loss of Nichol and Dhariwal (2021).

Noise is added to a latent x_0 over T steps: x_t = sqrt(s_t) x_0 + sqrt(1 - s_t) noise, where the signal level s_t
(alpha-bar in the papers) falls from nearly 1 to nearly 0. A network that reads x_t and t estimates the noise and the
variance of one step back; a sample starts as noise and takes all steps back.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

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

SAMPLING_STEPS = 100

# The last step back, to x_0, is scored as the probability of a bin of this half-width: half a grey level of images
# scaled to [-1, 1], as in the papers, so that losses can be compared.
HALF_BIN = 1 / 255

# Samples are clamped to this range. Posterior means of trained autoencoders stay within 6: the KL term pulls them
# towards N(0, 1).
LATENT_BOUND = 10.0


class Level(NamedTuple):
    """Levels of steps t, shaped as t with a last dimension of 1, float64.

    Attributes:
        signal: s_t.
        beta: variance of the noise added by step t, 1 - s_t / s_{t-1}.
        log_floor: logarithm of the variance of the true step back q(x_{t-1} | x_t, x_0); at t = 0, where it is 0, that
            of t = 1. It is the lower end of the learned variance, log beta the upper.
        first: whether t = 0.
    """

    signal: Tensor
    beta: Tensor
    log_floor: Tensor
    first: Tensor


class Step(NamedTuple):
    """The network's step back: x_{t-1} is normal with this mean and logarithm of the variance, `[..., l]`."""

    mean: Tensor
    log_variance: Tensor


@dataclass(frozen=True)
class Schedule:
    """Signal levels of T steps, and the time that the network reads at each.

    Attributes:
        signal: s_t `[T]` float64, falling.
        time: `[T]` int64; 0..T-1 unless the schedule is `respaced`.
    """

    signal: Tensor
    time: Tensor

    @classmethod
    def cosine(cls, steps: int = 1000) -> "Schedule":
        """s_t = f(t + 1) / f(0) with f(t) = cos^2((t/T + 0.008) / 1.008 · pi/2), no step's beta above 0.999."""
        level = ((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2).cos().square()
        kept = (level[1:] / level[:-1]).clamp(min=1 - 0.999)
        return cls(kept.cumprod(0), torch.arange(steps))

    def respaced(self, steps: int) -> "Schedule":
        """`steps` of the steps, evenly spaced from the first to the last: a coarser schedule of the same levels."""
        chosen = torch.linspace(0, len(self.signal) - 1, steps, dtype=torch.float64).round().long()
        return Schedule(self.signal[chosen], self.time[chosen])

    def at(self, t: Tensor) -> Level:
        """The levels of the steps `t` (int64, any shape), on their device."""
        signal = self.signal.to(t.device)
        before = torch.cat([signal.new_ones(1), signal[:-1]])
        beta = 1 - signal / before
        log_floor = (beta * (1 - before) / (1 - signal))[1:].log()
        log_floor = torch.cat([log_floor[:1], log_floor])
        t = t.unsqueeze(-1)
        return Level(signal[t], beta[t], log_floor[t], t == 0)


def diffused(level: Level, x0: Tensor, noise: Tensor) -> Tensor:
    """x_t `[..., l]` from x_0 and standard normal noise, in their precision."""
    return level.signal.sqrt().to(x0.dtype) * x0 + (1 - level.signal).sqrt().to(x0.dtype) * noise


def step_back(level: Level, x_t: Tensor, output: Tensor) -> Step:
    """The step that the network's output `[..., 2 l]` describes: noise estimate, and variance between its two ends.

    The second half v moves the log-variance from `log_floor` (v = -1) to log beta (v = 1).
    """
    noise, v = output.chunk(2, dim=-1)
    kept, upper = 1 - level.beta, (v + 1) / 2
    mean = (x_t - (level.beta / (1 - level.signal).sqrt()).to(x_t.dtype) * noise) / kept.sqrt().to(x_t.dtype)
    log_variance = upper * level.beta.log().to(v.dtype) + (1 - upper) * level.log_floor.to(v.dtype)
    return Step(mean, log_variance)


def bounded(level: Level, x_t: Tensor, output: Tensor, bound: float) -> Tensor:
    """The output `[..., 2 l]`, its noise estimate changed so that the x_0 it implies is within +-bound.

    x_0 = (x_t - sqrt(1 - s_t) noise) / sqrt(s_t): where x_t is nearly all noise, an error of the estimate is multiplied
    by up to 20,000, and later steps do not correct it.
    """
    noise, v = output.chunk(2, dim=-1)
    kept, lost = level.signal.sqrt().to(x_t.dtype), (1 - level.signal).sqrt().to(x_t.dtype)
    x0 = ((x_t - lost * noise) / kept).clamp(-bound, bound)
    return torch.cat([(x_t - kept * x0) / lost, v], dim=-1)


def diffusion_losses(level: Level, x0: Tensor, noise: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """(squared error of the noise, variational bound) of the network's output `[..., 2 l]` at x_t; `[...]` each.

    Both are means over dimensions, the bound in bits. The training loss is their sum. The bound trains the variance
    alone: no gradient flows from it into the noise estimate.
    """
    estimate, v = output.chunk(2, dim=-1)
    error = (noise - estimate).square().mean(-1)
    x_t = diffused(level, x0, noise)
    step = step_back(level, x_t, torch.cat([estimate.detach(), v], dim=-1))
    # The mean of the true step differs from the network's by the error of the noise alone.
    distance = (level.beta / ((1 - level.signal) * (1 - level.beta)).sqrt()).to(x0.dtype) * (noise - estimate.detach())
    gap = level.log_floor.to(x0.dtype) - step.log_variance
    divergence = (gap.exp() - 1 - gap + distance.square() * (-step.log_variance).exp()) / 2
    bound = torch.where(level.first, -log_bin_probability(x0, step), divergence)
    return error, bound.mean(-1) / math.log(2)


def log_bin_probability(x: Tensor, step: Step) -> Tensor:
    """log P(x - HALF_BIN < X < x + HALF_BIN) of a normal X, per dimension; beyond +-0.999 the bin has no outer end."""
    narrow = (-step.log_variance / 2).exp()
    below = _normal_cdf((x - step.mean - HALF_BIN) * narrow)
    above = _normal_cdf((x - step.mean + HALF_BIN) * narrow)
    below = torch.where(x < -0.999, torch.zeros_like(below), below)
    above = torch.where(x > 0.999, torch.ones_like(above), above)
    return (above - below).clamp(min=1e-12).log()


def sample(
    schedule: Schedule,
    network: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    noise: Callable[[int], Tensor],
    bound: float,
) -> Tensor:
    """A sample `[..., l]`: all steps back from noise.

    Args:
        schedule: the steps to take, usually `respaced`.
        network: (x_t, time as a scalar int64 tensor) -> output `[..., 2 l]`.
        x: standard normal noise `[..., l]`.
        noise: standard normal noise shaped as `x` for each step t > 0.
        bound: largest absolute value of a sample in any dimension (see `bounded`).
    """
    for t in reversed(range(len(schedule.time))):
        level = schedule.at(torch.tensor(t, device=x.device))
        step = step_back(level, x, bounded(level, x, network(x, schedule.time[t].to(x.device)), bound))
        x = step.mean if t == 0 else step.mean + (step.log_variance / 2).exp() * noise(t)
    return x


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal distribution function, as the papers' losses have it."""
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


class DiffusionHead(nn.Module):
    """Learns the noise and the variance of each of 1000 steps; samples by 100 of them."""

    def __init__(self, config: "TransformerConfig", head: HeadConfig, latent: int) -> None:
        super().__init__()
        self.config, self.latent, self.samples = config, latent, head.samples
        self.net = AdaptiveNetwork(config, head, latent, 2 * latent)
        self.schedule = Schedule.cosine()

    def loss(self, hidden: Tensor, target: Target, noise: Noise) -> HeadLoss:
        """Noise error plus variational bound, the mean over `head.samples` noise levels per position.

        Each has its own step, its own noise and its own draw of the posterior.
        """
        draws, steps = (target.tokens.shape[0], self.samples), len(self.schedule.time)
        t = own_positions(noise.integers("diffusion/time", steps, *draws), self.config)
        added = own_positions(noise.normal("diffusion/noise", *draws, self.latent), self.config)
        x0 = own_positions(target.latents(noise.normal("diffusion/target", *draws, self.latent)), self.config)
        level = self.schedule.at(t)
        x_t = diffused(level, x0, added)
        output = self.net(x_t, t, self.net.condition(hidden))
        error, bound = (each.mean(-1) for each in diffusion_losses(level, x0, added, output))
        return HeadLoss(error + bound, {"noise_error": error.detach(), "bound": bound.detach()})

    def sample(self, hidden: Tensor, noise: Noise, samples: int) -> Tensor:
        """`samples` independent latents per position, `[S, B, N, l]`."""
        positions = all_positions(hidden, self.config)
        condition = self.net.condition(hidden)

        def draw(name: str) -> Tensor:
            return own_positions(noise.normal(f"diffusion/{name}", positions, samples, self.latent), self.config)

        def network(x: Tensor, time: Tensor) -> Tensor:
            return self.net(x, time.view(1, 1, 1), condition)

        schedule = self.schedule.respaced(SAMPLING_STEPS)
        return sample(schedule, network, draw("start"), lambda t: draw(f"step-{t}"), LATENT_BOUND)


def build(config: "TransformerConfig", shape: ModelShape) -> DiffusionHead:
    """The head of a model of this shape."""
    return DiffusionHead(config, shape.head, shape.latent)


def costs(shape: ModelShape) -> HeadCosts:
    """One evaluation of the network per noise level in training, one per step back in sampling."""
    return adaptive.costs(shape, outputs=2 * shape.latent, sampling_evaluations=SAMPLING_STEPS)


def kernels(shape: ModelShape, load: Load) -> Kernels:
    """Of the final norm, the network and its loss, whose bound takes 113 elementwise kernels forward."""
    size = load.float32(shape.head.samples * shape.latent)
    loss = pointwise(190 * size, 120 * size, kernels=(113, 73))
    return adaptive.kernels(shape, load, outputs=2 * shape.latent, loss=loss)


def activations(shape: ModelShape, load: Load) -> Activations:
    """Of the final norm, the network and its loss.

    The loss keeps, l wide for each noise level, 13 float32 tensors and 2 masks: the error of the noise; of the
    divergence, exp(gap), the squared distance of the means and the inverse variance; of the bin's probability, the
    inverse deviation, and at each end the distance from the mean, its product with the inverse deviation and the tanh
    (two masks where a bin has no outer end), then the difference of the two and the same clamped.
    """
    n = shape.head.samples * shape.latent
    return adaptive.activations(shape, load, loss=13 * load.float32(n) + 2 * load.own_rows * n)
