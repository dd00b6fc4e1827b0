"""The study of BrierLM against cross-entropy: which models it trains, and when it scores them."""

from dataclasses import dataclass

from calm_core.config.experiment import Experiment
from calm_core.config.schema import PathText, option
from calm_core.errors import UserError
from calm_core.project import ROOT

DEFAULT_CONFIG = ROOT / "configs" / "studies" / "brier_correlation.yaml"


@dataclass(frozen=True)
class CorrelationConfig:
    """Autoregressive models of several widths, scored on the way through their training."""

    run: PathText = option("runs/brier_correlation", "folder of the experiment")
    widths: list[int] = option([32, 64, 128], "hidden sizes of the models; their feed-forward layers grow alike")
    evaluations: int = option(10, "evaluations of each model, at steps that grow geometrically")
    first: int = option(20, "step of the first one; the last is at base.training.steps")
    base: Experiment = option(Experiment, "what all models share; the head is softmax")

    def __post_init__(self) -> None:
        if not self.widths or self.evaluations < 2 or not 0 < self.first < self.base.training.steps:
            raise UserError(
                "brier_correlation wants at least one width, evaluations >= 2 and 0 < first < base.training.steps."
            )

    @property
    def steps(self) -> list[int]:
        """The steps after which each model is scored."""
        last = self.base.training.steps
        ratio = last / self.first
        return sorted({round(self.first * ratio ** (i / (self.evaluations - 1))) for i in range(self.evaluations)})
