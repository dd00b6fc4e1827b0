"""The pointwise work between matrix products, as pure functions that a compiler turns into one kernel each.

Run eagerly, each operation reads its inputs from memory and writes its result back: on a GPU that takes as long as the
products. Compiled, a function reads and writes once, forward and backward. `fused` compiles a function or not; the
results differ by rounding alone.
"""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Function = TypeVar("Function", bound=Callable)


def fused(module: nn.Module, function: Function) -> Function:
    """`function`, compiled where `fuses(module)`."""
    return compiled(function) if fuses(module) else function


def fuses(module: nn.Module) -> bool:
    """Whether `module` trains and its configuration asks for fused kernels.

    Evaluation and sampling run eagerly: their many shapes would each be compiled.
    """
    return module.training and module.config.bias_activation_fusion


@cache
def compiled(function: Function) -> Function:
    """`function`, with a kernel for each combination of shapes.

    One that cannot be traced whole raises an error.
    """
    return torch.compile(function, fullgraph=True, dynamic=False, recompile_limit=64)


def silu(x: Tensor, bias: Tensor | None) -> Tensor:
    """SiLU of x + bias: `[..., d]`, `[d]` -> `[..., d]`."""
    return F.silu(add_bias(x, bias))


def silu_per_position(x: Tensor, condition: Tensor, bias: Tensor | None, samples: int) -> Tensor:
    """SiLU of x + condition + bias, `[S, B * N, d]`: condition `[S, B, d]` is repeated for the N samples."""
    return F.silu((x.unflatten(1, (-1, samples)) + add_bias(condition, bias).unsqueeze(2)).flatten(1, 2))


def swiglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(g) * u of [g, u] = x + bias: `[..., 2 d]`, `[2 d]` -> `[..., d]`."""
    gate, up = add_bias(x, bias).chunk(2, dim=-1)
    return F.silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and its root-mean-square norm."""
    total = x + y
    return total, rms_norm(total, weight, eps)


def add_layer_norm(
    x: Tensor, y: Tensor, y_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + y + y_bias, and its layer norm."""
    total = x + add_bias(y, y_bias)
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


def add_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """x + bias."""
    return x if bias is None else x + bias


def softmax_sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row of `[n, V]`, and the sum of the exponentials lowered by it: `[n, 1]`, float32.

    Of float64 logits they are float64. A row of nothing but -inf has a finite largest one, so that its sum is 0.
    """
    raised = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = raised.amax(-1, keepdim=True).clamp(min=torch.finfo(raised.dtype).min)
    return largest, (raised - largest).exp_().sum(-1, keepdim=True)


def softmax_slope(logits: Tensor, shift: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(logits - shift) * factor in `dtype`: `[n, V]` and two of `[n, 1]`, in whose dtype it is computed."""
    return (logits.to(shift.dtype) - shift).exp_().mul_(factor).to(dtype)
