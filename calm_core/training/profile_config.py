"""Which training steps to profile."""

from dataclasses import dataclass

from calm_core.config import option
from calm_core.errors import UserError


@dataclass(frozen=True)
class ProfileConfig:
    """Which steps to profile."""

    steps: list[int] = option([], "first and last training step to profile, such as [10, 12]; [] profiles none")

    def __post_init__(self) -> None:
        if self.steps and not (len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[1]):
            raise UserError(f"profile.steps={self.steps} is no range: give the first and the last step, as [10, 12].")
