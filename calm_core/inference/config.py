"""Which texts show what a model says."""

from dataclasses import dataclass

from calm_core.config import option
from calm_core.errors import UserError


@dataclass(frozen=True)
class SamplesConfig:
    """Prompts that a trained model continues, and a model in training if asked to."""

    prompts: list[str] = option(["The state of the Union is", ""], "texts to continue; empty begins a document")
    temperatures: list[float] = option([1.0, 0.5], "temperatures of the samples, each 1/n")
    max_tokens: int = option(80, "tokens of each sample, at most")
    while_training: bool = option(
        False, "continue the prompts at each evaluation too, where every rank holds the whole model"
    )

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"samples.max_tokens={self.max_tokens} must be at least 1.")
        for temperature in self.temperatures:
            if not 0 < temperature <= 1:
                raise UserError(f"samples.temperatures holds {temperature}: choose values above 0 and at most 1.")

    def require_whole_model(self, tensor: int, pipeline: int) -> None:
        """Refuse samples in training where no rank holds the whole model.

        Raises:
            UserError: naming the mend.
        """
        if self.while_training and tensor * pipeline > 1:
            raise UserError(
                "samples.while_training=true needs ranks that hold the whole model, but parallel.tensor or "
                "parallel.pipeline spreads it: set it to false, and continue prompts from checkpoints by "
                "pretrain/sample.py."
            )
