"""How far a run has come."""

from dataclasses import dataclass, replace
from typing import Any

from calm_core.training.spikes import Verdict


@dataclass(frozen=True)
class Progress:
    """All that a resume needs besides weights and moments.

    Attributes:
        step: steps done.
        consumed: samples consumed.
        updates: steps whose update was applied.
        bad_in_a_row: steps with a loss or gradient that was not finite since the last update.
        spikes: steps whose update was left out as a spike.
        spikes_in_a_row: those of them since the last update.
        recent: loss and gradient norm of the last applied updates, as many as spikes are measured by.
    """

    step: int = 0
    consumed: int = 0
    updates: int = 0
    bad_in_a_row: int = 0
    spikes: int = 0
    spikes_in_a_row: int = 0
    recent: tuple[tuple[float, float], ...] = ()

    @classmethod
    def restored(cls, values: dict[str, Any]) -> "Progress":
        """Progress from its fields as JSON gives them back."""
        progress = cls(**values)
        return replace(progress, recent=tuple((loss, norm) for loss, norm in progress.recent))

    def after(self, verdict: Verdict, samples: int, loss: float, norm: float, remembered: int) -> "Progress":
        """Progress after one more step of so many samples; `remembered` updates stay in `recent`."""
        done = replace(self, step=self.step + 1, consumed=self.consumed + samples)
        if verdict == Verdict.NOT_FINITE:
            return replace(done, bad_in_a_row=self.bad_in_a_row + 1)
        if verdict == Verdict.SPIKE:
            return replace(done, spikes=self.spikes + 1, spikes_in_a_row=self.spikes_in_a_row + 1)
        recent = (*self.recent, (loss, norm))[-remembered:] if remembered else ()
        return replace(done, updates=self.updates + 1, bad_in_a_row=0, spikes_in_a_row=0, recent=recent)
