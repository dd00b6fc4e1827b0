"""What the training loop needs from the thing it trains. The loop knows no head, no loss and no file format."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch

from calm_core.config.training_config import ParallelConfig
from calm_core.distributed.engine import Engine
from calm_core.distributed.topology import Topology
from calm_core.megatron import MegatronModule


class Task(Protocol):
    """A model, its data and its evaluation.

    Attributes:
        name: names folders and plots.
        section: section of the configuration with its training settings.
        shape_type: the class whose fields `identity["model"]` has, with their defaults.
        summary: the model in a few words, for the terminal.
        tokens_per_sample: tokens that one sample trains on.
        flops_per_sample: floating-point operations of its forward and backward pass, as executed.
        stages: what each pipeline stage holds, as named values.
        identity: values that a resumed run must share with the checkpoint (shape, data, seed).
    """

    name: str
    section: str
    shape_type: type
    summary: str
    tokens_per_sample: int
    flops_per_sample: float
    stages: list[dict[str, Any]]
    identity: dict[str, Any]

    def check(self, layout: ParallelConfig, world: int) -> None:
        """Refuse a layout of a world of ranks that model or data do not fit.

        Raises:
            UserError: naming what to change.
        """
        ...

    def build(self, topology: Topology, dtype: torch.dtype) -> list[MegatronModule]:
        """This rank's model parts with their initial weights."""
        ...

    def shared_with(self, model: dict[str, Any]) -> tuple[str, ...]:
        """The prefixes of the names of the weights that a checkpoint of this `model` can give.

        Raises:
            UserError: naming what does not fit, if it can provide none.
        """
        ...

    def begin(self, done: float) -> None:
        """Called before each step with the share of the run's steps that are done."""
        ...

    def load(self, samples: np.ndarray) -> Any:
        """The micro-batch of the samples with these global indices: a dataclass with tensors on the host.

        Called from a loader thread: it runs no model.
        """
        ...

    def require(self, samples: int) -> None:
        """Refuse a run that consumes this many samples if the stores have fewer.

        Raises:
            UserError: saying how many they have.
        """
        ...

    def documents(self, samples: np.ndarray) -> list[str]:
        """The names of the documents that the samples with these global indices are from, each once."""
        ...

    def forward_step(self, micro_batches: Iterator[Any], model: MegatronModule) -> tuple[Any, Any]:
        """One micro-batch through one model part, with the signature that Megatron-core's schedules call.

        The second value turns the first into (loss for backward, {name: detached scalar}).
        """
        ...

    def evaluate(self, engine: Engine, stop: Callable[[], bool] = ...) -> dict[str, Any] | None:
        """Metrics on held-out documents, on the rank that reports; None if `stop` ended the evaluation. Collective.

        Args:
            engine: the model.
            stop: asked now and then by all ranks at the same time; collective.
        """
        ...

    def texts(self, engine: Engine) -> list[dict[str, Any]]:
        """Continuations of the configured prompts by the current model, on rank 0: temperature, prompt and text.

        Collective; [] on the other ranks.
        """
        ...

    def is_finished(self) -> bool:
        """Whether `finish` has been done."""
        ...

    def finish(self, engine: Engine) -> None:
        """What remains to be done after the last step, such as writing an artefact. Collective."""
        ...
