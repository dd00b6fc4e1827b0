"""What the pipeline needs to know beyond its stages."""

from dataclasses import dataclass

from calm_core.config import option
from calm_core.errors import UserError


@dataclass(frozen=True)
class PipelineConfig:
    """How the stages are started, and the texts that the trained model continues at the end."""

    processes: int = option(2, "processes of each training; at most one per GPU where there are GPUs")
    nodes: int = option(0, "on a cluster: nodes that train CALM; 0 means those of its launcher")
    shares: int = option(1, "on a cluster: tasks of an array that tokenize, and that encode chunks, together")
    prompts: list[str] = option(["The state of the Union is", ""], "texts to continue; empty begins a document")
    temperatures: list[float] = option([1.0, 0.5], "temperatures of the samples, each 1/n")
    max_tokens: int = option(80, "tokens of each sample, at most")

    def __post_init__(self) -> None:
        for name in ("processes", "shares", "max_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"pipeline.{name}={getattr(self, name)} must be at least 1.")
        if self.nodes < 0:
            raise UserError(f"pipeline.nodes={self.nodes} is no number of nodes: 0 means those of the launcher.")
        for temperature in self.temperatures:
            if not 0 < temperature <= 1:
                raise UserError(f"pipeline.temperatures holds {temperature}: choose values above 0 and at most 1.")
