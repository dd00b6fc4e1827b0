"""What the training loop asks of the thing it trains. The loop knows no head, no loss and no file format."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core.transformer.module import MegatronModule

from calm_core.distributed.engine import Engine
from calm_core.distributed.topology import Topology


class Task(Protocol):
    """A model, its data and its evaluation.

    Attributes:
        name: of the stage, used for folders and plots.
        tokens_per_sample: tokens that one sample trains on.
        flops_per_sample: floating-point operations of its forward and backward pass, as executed.
        stages: what each pipeline stage holds, as named values.
        identity: values that a resumed run must share with the checkpoint (shape, data, seed).
    """

    name: str
    tokens_per_sample: int
    flops_per_sample: float
    stages: list[dict[str, Any]]
    identity: dict[str, Any]

    def build(self, topology: Topology, dtype: torch.dtype) -> list[MegatronModule]:
        """This rank's model chunks with their initial weights."""
        ...

    def shared_with(self, model: dict[str, Any]) -> str:
        """What weights a checkpoint whose identity has this `model` can give: the prefix of their names, "" for all.

        Raises:
            UserError: naming what does not fit, if it can give none.
        """
        ...

    def load(self, samples: np.ndarray) -> Any:
        """The micro-batch of the samples with these global indices, on the host (called from a loader thread)."""
        ...

    def documents(self, samples: np.ndarray) -> list[str]:
        """The names of the documents behind the samples with these global indices, each once."""
        ...

    def forward_step(self, micro_batches: Iterator[Any], model: MegatronModule) -> tuple[Any, Any]:
        """One micro-batch through one model chunk, as Megatron-core's schedules want it.

        The second value turns the first into (loss for backward, {name: detached scalar}).
        """
        ...

    def texts(self, engine: Engine) -> list[dict[str, Any]]:
        """What the model says at this point, on the rank that reports: records with temperature, prompt and text."""
        ...

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Metrics on held-out documents, on the rank that reports. Collective."""
        ...
