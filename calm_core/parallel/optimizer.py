"""The optimizer that DeepSpeed shards: AdamW behind a gate."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from calm_core.config import option
from calm_core.errors import UserError

NOT_FINITE = -1  # the answer to gradients that are not, where an update is asked for


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and gradient clipping (paper, section 4.1)."""

    learning_rate: float = option(3e-4, "peak learning rate")
    beta1: float = option(0.9, "decay of the first moment")
    beta2: float = option(0.95, "decay of the second moment")
    eps: float = option(1e-8, "added to the root of the second moment")
    weight_decay: float = option(0.1, "decoupled decay of matrices and embeddings; norms and biases have none")
    clip: float = option(1.0, "largest global gradient norm; 0 clips nothing")

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise UserError(f"optimizer.learning_rate={self.learning_rate} must be above 0.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)} is outside 0 <= {name} < 1.")
        for name in ("eps", "weight_decay", "clip"):
            if getattr(self, name) < 0:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must not be negative.")


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
