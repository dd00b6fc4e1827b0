"""The energy loss: a strictly proper score of a sampler, from samples alone without a likelihood (paper, section 3)."""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from calm_core.model import pointwise

# Distances between samples and targets held at once, by device: few calls that fit a CPU's cache or occupy a GPU.
DISTANCES_AT_ONCE = {"cpu": 2**19, "cuda": 2**25}


class EnergyLoss(NamedTuple):
    """The loss per position and its two terms, each `[S, B]`: `loss = 2 * to_target - between`."""

    loss: Tensor
    to_target: Tensor  # mean of |x_n - z_m|^beta, detached: how far the samples are from the posterior
    between: Tensor  # mean of |x_n - x_k|^beta over n != k, detached: how far they are from each other


def energy_loss(
    samples: Tensor,
    mean: Tensor,
    log_std: Tensor,
    target_noise: Tensor,
    beta: float = 1.0,
    slice_size: int | None = None,
    fuse: bool = False,
) -> EnergyLoss:
    """Energy loss of head samples against draws of the target chunk's posterior (paper, section 3).

    With x_n the samples at a position and z_m = mean + exp(log_std) * eps_m the draws, the loss is
    `2/(N M) sum_nm |x_n - z_m|^beta - 1/(N (N-1)) sum_{n != k} |x_n - x_k|^beta`. The energy score is its negative.

    The G rows of `target_noise` split the S positions into G runs of ceil(S / G) neighbours, the last one possibly
    shorter; a run shares its draws, so that G = S gives every position draws of its own. The tensors are laid out
    as the model's, so nothing is transposed in memory. The draws z are not formed, and the gradient is computed with
    the loss, slice by slice: except for inputs and gradient, memory does not grow with S and B.

    Args:
        samples: head samples, `[S, B, N, l]`, N >= 2; the only input that receives a gradient.
        mean: posterior mean of the target chunks, `[S, B, l]`.
        log_std: logarithm of the posterior's standard deviation, `[S, B, l]`.
        target_noise: standard normal draws, `[G, B, M, l]`.
        beta: exponent of the distances, 0 < beta < 2.
        slice_size: distances between samples and targets held at once; by default `DISTANCES_AT_ONCE` of the device.
        fuse: compile the terms of a slice (see `model.pointwise`).

    Returns:
        Loss and terms, `[S, B]`, float64 for float64 samples and float32 otherwise.

    Raises:
        ValueError: the shapes do not fit together, N < 2, or beta is out of its range.
    """
    _check(samples, mean, log_std, target_noise, beta)
    slice_size = slice_size or DISTANCES_AT_ONCE["cpu" if samples.device.type == "cpu" else "cuda"]
    arguments = (mean.detach(), log_std.detach(), target_noise.detach(), beta, slice_size, fuse)
    if torch.is_grad_enabled() and samples.requires_grad:
        return EnergyLoss(*_WithGradient.apply(samples, *arguments))
    return _in_slices(samples.detach(), *arguments, gradient=None)


class _WithGradient(torch.autograd.Function):
    """Computes the gradient of the samples in the forward pass, from the same distances, and keeps nothing else."""

    @staticmethod
    def forward(ctx: Any, samples: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        gradient = torch.empty(samples.shape, dtype=_precision(samples), device=samples.device)
        terms = _in_slices(samples, *arguments, gradient=gradient)
        ctx.save_for_backward(gradient)
        ctx.dtype = samples.dtype
        ctx.mark_non_differentiable(terms.to_target, terms.between)
        return tuple(terms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss[..., None, None]).to(ctx.dtype), *[None] * 6


def _in_slices(
    samples: Tensor,
    mean: Tensor,
    log_std: Tensor,
    target_noise: Tensor,
    beta: float,
    slice_size: int,
    fuse: bool,
    gradient: Tensor | None,
) -> EnergyLoss:
    """The loss of all positions; writes the gradient of each position's loss into `gradient` if given."""
    of_samples, of_target = (pointwise.compiled(f) if fuse else f for f in (_between, _to_target))
    positions, batch, count, _ = samples.shape
    runs, _, draws, _ = target_noise.shape
    width = -(-positions // runs)
    to_target = torch.empty(positions, batch, dtype=_precision(samples), device=samples.device)
    between = torch.empty_like(to_target)
    runs_held = max(1, slice_size // (width * count * draws))
    columns = min(batch, runs_held)
    full = positions - positions % width  # a shorter last run is a slice of its own
    bounds = [*range(0, full, width * (runs_held // columns)), *range(full, positions, width), positions]
    with torch.autocast(samples.device.type, enabled=False):
        for start, stop in pairwise(bounds):
            run = slice(start // width, -(-stop // width))
            for column in range(0, batch, columns):
                here = slice(start, stop), slice(column, column + columns)
                x = samples[here].to(to_target.dtype)
                target = mean[here].to(x.dtype), log_std[here].to(x.dtype), target_noise[run, here[1]].to(x.dtype)
                into = None if gradient is None else gradient[here]
                between[here] = of_samples(x, beta, into)
                to_target[here] = of_target(x, *target, beta, into)
    return EnergyLoss(2 * to_target - between, to_target, between)


def _between(x: Tensor, beta: float, gradient: Tensor | None) -> Tensor:
    """Mean of |x_n - x_k|^beta over n != k, `[s, b]`; sets `gradient` to that of its negative.

    By differences: inner products would cancel where samples nearly coincide, as those of an untrained head do.
    """
    count = x.shape[2]
    pairs = count * (count - 1) / 2
    total = x.new_zeros(x.shape[:2])
    if gradient is not None:
        gradient.zero_()
    for offset in range(1, count):
        difference = x[:, :, offset:] - x[:, :, :-offset]
        square = torch.linalg.vecdot(difference, difference)
        distance = square.pow(beta / 2)
        total += distance.sum(-1)
        if gradient is not None:
            slope = distance.mul_(beta / pairs).div_(square.clamp_(min=_tiny(x)))  # 0 for a coincident pair
            difference *= slope.unsqueeze(-1)
            gradient[:, :, offset:] -= difference
            gradient[:, :, :-offset] += difference
    return total.div_(pairs)


def _to_target(x: Tensor, mean: Tensor, log_std: Tensor, noise: Tensor, beta: float, gradient: Tensor | None) -> Tensor:
    """Mean of |x_n - z_m|^beta over n and m, `[s, b]`; adds twice its gradient to `gradient`.

    By inner products, centred on the posterior mean: with c = x - mean,
    |x - z|^2 = |c|^2 + sum_j sigma_j^2 eps_j^2 - 2 (c sigma) . eps, so the draws of a run are read by two matrix
    products.
    """
    runs, _, draws, _ = noise.shape

    def by_run(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (runs, -1)).transpose(1, 2)  # [runs, b, width, ...]

    sigma = by_run(log_std).exp()
    centred = (by_run(x) - by_run(mean).unsqueeze(3)).contiguous()
    scaled = centred * sigma.unsqueeze(3)
    own = torch.linalg.vecdot(centred, centred)  # [runs, b, width, N]
    spread = sigma.square() @ noise.square().mT  # [runs, b, width, M]
    square = (own.unsqueeze(-1) + spread.unsqueeze(3)).flatten(0, 1).flatten(1, 2)  # [runs b, width N, M]
    scaled = scaled.flatten(0, 1).flatten(1, 2)
    noise = noise.flatten(0, 1)
    square.baddbmm_(scaled, noise.mT, alpha=-2).clamp_(min=0)
    distance = square.pow(beta / 2)
    value = distance.sum(-1).view_as(own).sum(-1).div_(own.shape[-1] * draws)
    if gradient is not None:
        # A square below the rounding error of its terms is not accurate: bound its slope, which may be infinite.
        floor = own.mul_(torch.finfo(x.dtype).eps).clamp_(min=_tiny(x)).view(*square.shape[:2], 1)
        slope = distance.mul_(2 * beta / (own.shape[-1] * draws)).div_(square.clamp_(min=floor))
        pull = torch.bmm(slope, noise).view_as(centred).mul_(sigma.unsqueeze(3))
        by_run(gradient).add_(centred.mul_(slope.sum(-1).view_as(own).unsqueeze(-1)).sub_(pull))
    return value.transpose(1, 2).flatten(0, 1)


def _precision(samples: Tensor) -> torch.dtype:
    return torch.promote_types(samples.dtype, torch.float32)


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


def _check(samples: Tensor, mean: Tensor, log_std: Tensor, target_noise: Tensor, beta: float) -> None:
    positions, batch, count, latent = samples.shape
    runs, _, draws, _ = target_noise.shape
    if not 0.0 < beta < 2.0 or count < 2:
        raise ValueError(f"The energy loss needs 0 < beta < 2 and at least 2 samples, not beta={beta}, N={count}.")
    if not mean.shape == log_std.shape == (positions, batch, latent):
        raise ValueError(f"mean {list(mean.shape)} or log_std {list(log_std.shape)} is not [S, B, l] of the samples.")
    if target_noise.shape != (runs, batch, draws, latent) or runs != -(-positions // -(-positions // max(runs, 1))):
        raise ValueError(f"target_noise {list(target_noise.shape)} does not fit samples {list(samples.shape)}.")
