"""Updates that are refused: a loss or gradient that is not finite, or far above what it has been of late."""

import math
from collections.abc import Sequence
from enum import IntEnum
from statistics import median

from calm_core.config.training_config import SpikeConfig
from calm_core.distributed.optimizer import NOT_FINITE

# The standard deviation of a normal distribution, by its median absolute deviation.
_DEVIATION = 1.4826

# A window of equal values has no deviation, and rounding is no spike: at least this share of the median counts as one.
_LEAST = 1e-3


class Verdict(IntEnum):
    """What is to become of an update; among ranks the lowest verdict holds."""

    NOT_FINITE = NOT_FINITE
    SPIKE = 0
    GOOD = 1


def judge(loss: float, norm: float, recent: Sequence[tuple[float, float]], config: SpikeConfig) -> Verdict:
    """The verdict on an update with this loss and gradient norm, after `recent` applied ones, the last `window`.

    A value is a spike when it exceeds the median of its recent ones by `deviations` x 1.4826 x their median absolute
    deviation: neither figure moves when a few values are wild. With less than half a window nothing is a spike.
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
    deviation = _DEVIATION * median(abs(value - middle) for value in values)
    return middle + deviations * max(deviation, _LEAST * abs(middle))
