"""The optimizer that DeepSpeed shards: AdamW that skips spikes, what a spike is, parameter groups and learning rate."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from calm_core.config.training_config import OptimizerConfig, ScheduleConfig, SpikeConfig

# The standard deviation of a normal distribution is this multiple of its median absolute deviation.
_DEVIATION_PER_MAD = 1.4826


class Verdict(IntEnum):
    """Whether an update is applied; where ranks disagree the lowest verdict holds."""

    NOT_FINITE = -1
    SPIKE = 0
    GOOD = 1


@dataclass(frozen=True)
class UpdateHistory:
    """The outcomes of the updates of a run; saved with each checkpoint.

    Attributes:
        updates: updates applied.
        bad_in_a_row: updates skipped since the last applied one because loss or gradient was not finite.
        spikes: updates skipped as spikes.
        spikes_in_a_row: those since the last applied update.
        recent: loss and gradient norm of the last applied updates, as many as the detector compares with.
    """

    updates: int = 0
    bad_in_a_row: int = 0
    spikes: int = 0
    spikes_in_a_row: int = 0
    recent: tuple[tuple[float, float], ...] = ()

    @classmethod
    def restored(cls, values: dict[str, Any]) -> "UpdateHistory":
        """The history from a mapping, read from JSON, that has its fields among others."""
        history = cls(**{field.name: values[field.name] for field in fields(cls)})
        return replace(history, recent=tuple((loss, norm) for loss, norm in history.recent))

    def after(self, verdict: Verdict, loss: float, norm: float, remembered: int) -> "UpdateHistory":
        """The history after one more update; the last `remembered` applied ones stay in `recent`."""
        if verdict == Verdict.NOT_FINITE:
            return replace(self, bad_in_a_row=self.bad_in_a_row + 1)
        if verdict == Verdict.SPIKE:
            return replace(self, spikes=self.spikes + 1, spikes_in_a_row=self.spikes_in_a_row + 1)
        recent = (*self.recent, (loss, norm))[-remembered:] if remembered else ()
        return replace(self, updates=self.updates + 1, bad_in_a_row=0, spikes_in_a_row=0, recent=recent)


class SpikeDetector:
    """Judges each update of a run by its loss and gradient norm, and remembers the outcome."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.history = UpdateHistory()

    def judge(self, loss: float, norm: float) -> Verdict:
        """The verdict on an update with this loss and gradient norm."""
        return judge(loss, norm, self.history.recent, self.config)

    def record(self, verdict: Verdict, loss: float, norm: float) -> None:
        """Remember an update."""
        self.history = self.history.after(verdict, loss, norm, self.config.remembered)


def judge(loss: float, norm: float, recent: Sequence[tuple[float, float]], config: SpikeConfig) -> Verdict:
    """The verdict on an update with this loss and gradient norm that follows the applied updates `recent`.

    A value is a spike when it exceeds the median of the recent ones by more than `deviations` x 1.4826 x their median
    absolute deviation; a few outliers hardly move either. With less than half a window nothing is a spike.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return Verdict.NOT_FINITE
    if config.action == "off" or 2 * len(recent) < config.window:
        return Verdict.GOOD
    limits = (limit(values, config.deviations) for values in zip(*recent, strict=True))
    return Verdict.GOOD if all(x <= most for x, most in zip((loss, norm), limits, strict=True)) else Verdict.SPIKE


def limit(values: Sequence[float], deviations: float) -> float:
    """The value `deviations` robust standard deviations above the median of `values`."""
    middle = median(values)
    deviation = _DEVIATION_PER_MAD * median(abs(value - middle) for value in values)
    return middle + deviations * max(deviation, _LEAST_DEVIATION * abs(middle))


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
    """Parameters of one kind, together of at least `size` elements where a kind has that many.

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


# Equal values have no deviation, and rounding errors are not spikes: the least deviation, as a fraction of the median.
_LEAST_DEVIATION = 1e-3
