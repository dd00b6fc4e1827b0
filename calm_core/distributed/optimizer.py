"""The optimizer that DeepSpeed shards: AdamW behind a gate."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from calm_core.config.training_config import OptimizerConfig, ScheduleConfig

NOT_FINITE = -1  # the answer to gradients that are not, where an update is asked for


class GatedAdamW(torch.optim.AdamW):
    """AdamW whose step asks first: unless `admit` answers above 0, neither weights nor moments change.

    ZeRO reduces, measures and clips the gradients before it calls this step, so the gate sees the global norm.
    """

    admit: Callable[[], int] = staticmethod(lambda: True)
    answer: int = NOT_FINITE

    def step(self, closure: None = None) -> None:
        """Apply one update if the gate admits it, and remember its answer."""
        self.answer = self.admit()
        if self.answer > 0:
            super().step(closure)


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> GatedAdamW:
    """AdamW over two groups: matrices and embeddings decay, norms and biases do not."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return GatedAdamW(groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=True)


def learning_rate_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """The share of the peak learning rate at `step` (0-based) of a run of `steps`.

    Warm-up reaches the peak at step `warmup`; the decays reach `floor` at the last step.
    """
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    start = {"constant": steps, "cosine": config.warmup, "wsd": round(steps * (1 - config.decay))}[config.kind]
    start = max(start, config.warmup)
    if step <= start or steps - 1 <= start:
        return 1.0
    progress = min(1.0, (step - start) / (steps - 1 - start))
    shape = (1 + math.cos(math.pi * progress)) / 2 if config.kind == "cosine" else 1 - progress
    return config.floor + (1 - config.floor) * shape
