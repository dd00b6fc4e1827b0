"""What the pipeline needs to know beyond its stages."""

from dataclasses import dataclass

from calm_core.config import option
from calm_core.errors import UserError


@dataclass(frozen=True)
class PipelineConfig:
    """How the stages are started."""

    processes: int = option(2, "processes of each training; at most one per GPU where there are GPUs")
    nodes: int = option(0, "on a cluster: nodes that train CALM; 0 means those of its launcher")
    shares: int = option(1, "on a cluster: tasks of an array that tokenize, and that encode chunks, together")

    def __post_init__(self) -> None:
        for name in ("processes", "shares"):
            if getattr(self, name) < 1:
                raise UserError(f"pipeline.{name}={getattr(self, name)} must be at least 1.")
        if self.nodes < 0:
            raise UserError(f"pipeline.nodes={self.nodes} is no number of nodes: 0 means those of the launcher.")
