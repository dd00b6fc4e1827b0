"""Sampling from logits: temperature, top-k and top-p, for heads that have a distribution over tokens."""

import torch
from torch import Tensor


def token_weights(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Weights proportional to P^(1/T), truncated, float64 `[..., V]`, from logits `[..., V]`.

    First the temperature, then the `top_k` most probable tokens (0: all), then of those the fewest whose probabilities
    together reach `top_p`. Of equally probable tokens the one with the lower id counts as the more probable.
    """
    weights = ((logits - logits.amax(-1, keepdim=True)).double() / temperature).exp()
    if not top_k and top_p == 1.0:
        return weights
    ordered, tokens = weights.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[..., top_k:] = 0
    before = ordered.cumsum(-1) - ordered
    kept = before < top_p * ordered.sum(-1, keepdim=True)
    return torch.zeros_like(weights).scatter(-1, tokens, ordered * kept)


def draw_tokens(weights: Tensor, uniform: Tensor) -> Tensor:
    """One token `[...]` for each distribution with weights `[..., V]`, by inversion of uniform draws `[...]`."""
    passed = weights.cumsum(-1)
    sought = uniform.double().unsqueeze(-1) * passed[..., -1:]
    return torch.searchsorted(passed, sought, right=True).squeeze(-1)
