"""Padding inside chunks: which tokens are text."""

import torch
from torch import Tensor


def text_tokens(tokens: Tensor, pad: int | None) -> Tensor:
    """Which tokens of the chunks `[..., K]` are text: all but the `pad` that a chunk ends in; all if `pad` is None."""
    if pad is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    return (tokens != pad).flip(-1).cumsum(-1).flip(-1) > 0
