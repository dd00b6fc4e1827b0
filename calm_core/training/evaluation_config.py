"""How much of the held-out documents an evaluation looks at."""

from dataclasses import dataclass

from calm_core.config import option
from calm_core.errors import UserError


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation of a model by its samples."""

    windows: int = option(64, "held-out windows scored during training; 0 means all of them")
    places: int = option(32, "scored places of a window, evenly spread over those there are; 0 means all of them")
    samples: int = option(16, "N, draws of the next tokens at each place; roll-outs where a chunk has fewer than 4")
    micro_batch: int = option(8, "windows per forward pass")

    def __post_init__(self) -> None:
        # The variance that comes from the draws takes four of them to tell.
        if self.samples < 4 or self.micro_batch < 1 or self.windows < 0 or self.places < 0:
            raise UserError("evaluation wants samples >= 4, micro_batch >= 1, windows >= 0 and places >= 0.")
