"""The machine that a plan (`--dry-run`) counts with."""

from dataclasses import dataclass

from calm_core.config import option
from calm_core.errors import UserError


@dataclass(frozen=True)
class PlanConfig:
    """The machine that `--dry-run` counts with; a run itself takes what it finds."""

    world: int = option(0, "ranks; 0 means those of this launch, or the fewest that the layout needs")
    device_memory_gib: float = option(80.0, "memory of one device")
    peak_tflops: float = option(989.0, "peak of one device in TFLOP/s: 989 is an H100's in bf16, 312 an A100's")
    mfu: float = option(0.4, "model FLOPs utilisation that the days are estimated at")

    def __post_init__(self) -> None:
        if self.world < 0:
            raise UserError(f"plan.world={self.world} is no number of ranks.")
        for name in ("device_memory_gib", "peak_tflops"):
            if getattr(self, name) <= 0:
                raise UserError(f"plan.{name}={getattr(self, name)} must be above 0.")
        if not 0 < self.mfu <= 1:
            raise UserError(f"plan.mfu={self.mfu} is no share of the peak: choose above 0 and at most 1.")
