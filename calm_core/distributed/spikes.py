"""Which updates to skip: a loss or gradient that is not finite, or far above that of the last updates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from statistics import median
from typing import Any

from calm_core.config.training_config import SpikeConfig

# The standard deviation of a normal distribution is this multiple of its median absolute deviation.
_DEVIATION_PER_MAD = 1.4826

# Equal values have no deviation, and rounding errors are no spikes: the deviation is at least this part of the median.
_LEAST_DEVIATION = 1e-3


class Verdict(IntEnum):
    """Whether an update is applied; where ranks disagree the lowest verdict holds."""

    NOT_FINITE = -1
    SPIKE = 0
    GOOD = 1


@dataclass(frozen=True)
class UpdateHistory:
    """What became of the updates of a run; saved with each checkpoint.

    Attributes:
        updates: updates applied.
        bad_in_a_row: updates skipped since the last applied one because loss or gradient was not finite.
        spikes: updates skipped as spikes.
        spikes_in_a_row: those since the last applied update.
        recent: loss and gradient norm of the last applied updates, as many as the detector compares with.
    """

    updates: int = 0
    bad_in_a_row: int = 0
    spikes: int = 0
    spikes_in_a_row: int = 0
    recent: tuple[tuple[float, float], ...] = ()

    @classmethod
    def restored(cls, values: dict[str, Any]) -> "UpdateHistory":
        """The history from a mapping, read from JSON, that has its fields among others."""
        history = cls(**{field.name: values[field.name] for field in fields(cls)})
        return replace(history, recent=tuple((loss, norm) for loss, norm in history.recent))

    def after(self, verdict: Verdict, loss: float, norm: float, remembered: int) -> "UpdateHistory":
        """The history after one more update; the last `remembered` applied ones stay in `recent`."""
        if verdict == Verdict.NOT_FINITE:
            return replace(self, bad_in_a_row=self.bad_in_a_row + 1)
        if verdict == Verdict.SPIKE:
            return replace(self, spikes=self.spikes + 1, spikes_in_a_row=self.spikes_in_a_row + 1)
        recent = (*self.recent, (loss, norm))[-remembered:] if remembered else ()
        return replace(self, updates=self.updates + 1, bad_in_a_row=0, spikes_in_a_row=0, recent=recent)


class SpikeDetector:
    """Judges each update of a run by its loss and gradient norm, and remembers what became of it."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.history = UpdateHistory()

    def judge(self, loss: float, norm: float) -> Verdict:
        """The verdict on an update with this loss and gradient norm."""
        return judge(loss, norm, self.history.recent, self.config)

    def record(self, verdict: Verdict, loss: float, norm: float) -> None:
        """Remember an update."""
        self.history = self.history.after(verdict, loss, norm, self.config.remembered)


def judge(loss: float, norm: float, recent: Sequence[tuple[float, float]], config: SpikeConfig) -> Verdict:
    """The verdict on an update with this loss and gradient norm that follows the applied updates `recent`.

    A value is a spike when it exceeds the median of the recent ones by more than `deviations` x 1.4826 x their median
    absolute deviation; a few outliers hardly move either. With less than half a window nothing is a spike.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return Verdict.NOT_FINITE
    if config.action == "off" or 2 * len(recent) < config.window:
        return Verdict.GOOD
    limits = (limit(values, config.deviations) for values in zip(*recent, strict=True))
    return Verdict.GOOD if all(x <= most for x, most in zip((loss, norm), limits, strict=True)) else Verdict.SPIKE


def limit(values: Sequence[float], deviations: float) -> float:
    """The value that lies `deviations` robust standard deviations above the median of `values`."""
    middle = median(values)
    deviation = _DEVIATION_PER_MAD * median(abs(value - middle) for value in values)
    return middle + deviations * max(deviation, _LEAST_DEVIATION * abs(middle))
