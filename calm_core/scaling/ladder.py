"""From one dial, the depth, to a whole model and how to train it."""

from dataclasses import dataclass, replace

from calm_core.model.config import BackboneConfig
from calm_core.scaling.config import LadderConfig

FFN_MULTIPLE = 32


@dataclass(frozen=True)
class Rung:
    """A model of the ladder.

    Attributes:
        backbone: its shape.
        learning_rate: peak.
        batch_tokens: tokens per step, before rounding to whole windows.
    """

    backbone: BackboneConfig
    learning_rate: float
    batch_tokens: float


def rung(depth: int, ladder: LadderConfig, base: BackboneConfig) -> Rung:
    """The model of `depth` layers by the rule of `LadderConfig`; what the rule does not name is as in `base`."""
    heads = max(1, round(ladder.aspect * depth / ladder.head_width))
    hidden = heads * ladder.head_width
    ffn = max(1, round(ladder.ffn_ratio * hidden / FFN_MULTIPLE)) * FFN_MULTIPLE
    relative = depth / ladder.reference_depth
    return Rung(
        replace(base, layers=depth, hidden=hidden, ffn=ffn, heads=heads, kv_groups=0),
        ladder.learning_rate * relative**ladder.learning_rate_exponent,
        ladder.batch_tokens * relative**ladder.batch_exponent,
    )
