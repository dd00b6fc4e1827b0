"""Where a model is scored: the same places of the text for every K."""

import math

import torch
from torch import Tensor

from calm_core.brier import MAX_TOKENS
from calm_core.data.packing import Packing
from calm_core.errors import UserError

# Scored chunks begin at token offsets divisible by this, so that models of every K score the same places.
STRIDE = 8


def scored_positions(positions: int, k: int, places: int = 0) -> Tensor:
    """Positions p of a window `[P]` that are scored: by their target, chunk p + 1, and the tokens that follow.

    The target begins at a token offset divisible by `STRIDE`, with at least half the window before it and four
    tokens of the window from there on: so whatever K is, the true next tokens are in the window, and a model that rolls
    out to foretell them stays in the context that it was trained on.

    Args:
        positions: S of the window.
        k: K.
        places: at most so many, evenly spread; 0 means all. The same choice for every K that divides 8.

    Raises:
        UserError: the window is too short to hold one.
    """
    offsets = torch.arange(1, positions) * k
    in_second_half = (2 * offsets >= positions * k) & (offsets + MAX_TOKENS <= positions * k)
    found = (in_second_half & (offsets % STRIDE == 0)).nonzero().flatten()
    if not len(found):
        raise UserError(
            f"A window of {positions} positions of {k} tokens has no place to score, which is a token offset divisible "
            f"by {STRIDE} with half the window before it: raise training.positions."
        )
    count = min(places or len(found), len(found))
    return found[torch.linspace(0, len(found) - 1, count, dtype=torch.float64).long()]


def measure(context: int, k: int, packing: Packing = "pack") -> str:
    """The name of BrierLM under a context of so many tokens: scores of other names are not comparable.

    Documents that are padded to whole chunks make windows that begin at other tokens for every K.
    """
    aligned = f"/align{k}" if packing == "align" else ""
    return f"brier_lm@ctx{context}/stride{math.lcm(STRIDE, k)}{aligned}"


def chunks_to_draw(k: int) -> int:
    """How many chunks of K tokens foretell the four tokens of BrierLM."""
    return -(-MAX_TOKENS // k)
