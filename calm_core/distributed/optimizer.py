"""The optimizer that DeepSpeed shards: AdamW that can skip an update, its parameter groups and its learning rate."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from calm_core.config.training_config import OptimizerConfig, ScheduleConfig, SpikeConfig
from calm_core.distributed.spikes import SpikeDetector, Verdict


@dataclass(frozen=True)
class Update:
    """The outcome of one optimizer step: the global gradient norm before clipping, and the verdict of all ranks."""

    gradient_norm: float
    verdict: Verdict

    @property
    def applied(self) -> bool:
        """Whether weights and optimizer state have changed."""
        return self.verdict == Verdict.GOOD


class SkipStepOptimizer(torch.optim.Optimizer):
    """Mixed into a torch optimizer: an update that the spike detector rejects changes neither weights nor state.

    ZeRO reduces the gradients, computes their norm and clips them before it calls `step`, so the detector sees the
    global norm. ZeRO does not call `step` at all if that norm is not finite.

    Attributes:
        detector: judges the updates and holds their history.
        global_norm: the global gradient norm of the current step, set by the owner of the gradients.
    """

    global_norm: Callable[[], float]

    def __init__(self, *arguments: Any, detector: SpikeDetector, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.detector = detector
        self._loss = math.nan
        self._verdict: Verdict | None = None

    def begin_update(self, loss: float, learning_rate: float) -> None:
        """Prepare the next update: its loss, for the detector, and its learning rate."""
        self._loss, self._verdict = loss, None
        for group in self.param_groups:
            group["lr"] = learning_rate

    def step(self, closure: None = None) -> None:
        """Apply one update unless a rank rejects it."""
        device = self.param_groups[0]["params"][0].device
        self._verdict = _lowest_of_ranks(self.detector.judge(self._loss, self.global_norm()), device)
        if self._verdict == Verdict.GOOD:
            super().step(closure)

    def end_update(self) -> Update:
        """The outcome of the update, recorded in the detector's history."""
        verdict = Verdict.NOT_FINITE if self._verdict is None else self._verdict
        update = Update(self.global_norm(), verdict)
        self.detector.record(verdict, self._loss, update.gradient_norm)
        return update

    def create_state(self) -> None:
        """Create the state of all parameters now, zero, so that a checkpoint can be loaded before the first step.

        An update by zero gradients at learning rate 0 changes no weight.
        """
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        rates = [group["lr"] for group in self.param_groups]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for group in self.param_groups:
            group["lr"] = 0.0
        super().step()
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        for parameter in parameters:
            parameter.grad = None
        self.set_update_count(0)

    def set_update_count(self, updates: int) -> None:
        """Tell the optimizer how many updates it has applied, if it counts them (Adam's bias correction does)."""
        for state in self.state.values():
            if "step" in state:
                state["step"].fill_(updates)

    def moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state that has one value for each element of `parameter`, by name (Adam: exp_avg and exp_avg_sq)."""
        return {
            name: value
            for name, value in self.state[parameter].items()
            if torch.is_tensor(value) and value.shape == parameter.shape
        }


class SkipStepAdamW(SkipStepOptimizer, torch.optim.AdamW):
    """AdamW that can skip an update."""


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, spikes: SpikeConfig, bucket: int
) -> SkipStepOptimizer:
    """AdamW over `buckets` of parameters as its groups: matrices and embeddings decay, norms and biases do not."""
    groups = [
        {"params": members, "weight_decay": config.weight_decay if members[0].dim() >= 2 else 0.0}
        for members in buckets(parameters, bucket)
    ]
    betas = (config.beta1, config.beta2)
    detector = SpikeDetector(spikes)
    return SkipStepAdamW(groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=True, detector=detector)


def buckets(parameters: Iterable[nn.Parameter], size: int) -> list[list[nn.Parameter]]:
    """Parameters of one kind, together of at least `size` elements where there are so many of a kind.

    They come in the order in which a backward pass completes their gradients, that is the last parameters first; those
    whose gradients have still to be summed over the tensor-parallel ranks afterwards are last.
    """
    full: list[list[nn.Parameter]] = []
    filling: dict[tuple[bool, ...], list[nn.Parameter]] = {}
    for parameter in reversed(list(parameters)):
        kind = parameter.dim() >= 2, is_split(parameter), is_summed(parameter)
        filling.setdefault(kind, []).append(parameter)
        if sum(member.numel() for member in filling[kind]) >= size:
            full.append(filling.pop(kind))
    return sorted([*full, *filling.values()], key=lambda members: is_summed(members[0]))


def is_split(parameter: nn.Parameter) -> bool:
    """Whether tensor-parallel ranks hold different parts of a parameter."""
    return getattr(parameter, "tensor_model_parallel", False)


def is_summed(parameter: nn.Parameter) -> bool:
    """Whether every tensor-parallel rank holds a parameter whole, but its gradient for a part of the sequence only."""
    return getattr(parameter, "sequence_parallel", False)


def _lowest_of_ranks(verdict: Verdict, device: torch.device) -> Verdict:
    """The lowest verdict of all ranks. Collective."""
    lowest = torch.tensor(float(verdict), device=device)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return Verdict(int(lowest.item()))


def learning_rate_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """The learning rate, as a fraction of its peak, at `step` (0-based) of a run of `steps`.

    Warm-up reaches the peak at step `warmup`; the decays reach `floor` at the last step.
    """
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    start = decay_start(steps, config)
    if step <= start or steps - 1 <= start:
        return 1.0
    progress = min(1.0, (step - start) / (steps - 1 - start))
    shape = (1 + math.cos(math.pi * progress)) / 2 if config.kind == "cosine" else 1 - progress
    return config.floor + (1 - config.floor) * shape


def decay_start(steps: int, config: ScheduleConfig) -> int:
    """The last step (0-based) at the peak learning rate, in a run of `steps`."""
    start = {"constant": steps, "cosine": config.warmup, "wsd": round(steps * (1 - config.decay))}[config.kind]
    return max(start, config.warmup)
