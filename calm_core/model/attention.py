"""Self-attention between its two matrices: heads, rotary position embedding, and the core with or without a cache."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_core.model.cache import KeyValueCache


class RotaryAngles(nn.Module):
    """The angles by which rotary position embedding turns the pairs of a head's dimensions."""

    def __init__(self, width: int, base: float) -> None:
        super().__init__()
        frequencies = 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: int, offset: int = 0) -> Tensor:
        """Angles `[positions, 1, 1, width]` from position `offset` on; both halves of the width are equal."""
        numbers = torch.arange(positions, device=self.frequencies.device, dtype=torch.float32) + offset
        angles = torch.outer(numbers, self.frequencies)
        return torch.cat([angles, angles], dim=-1)[:, None, None]


def rotation(rope: RotaryAngles, positions: int, cache: KeyValueCache | None, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of the angles of `positions` new positions, after those in the cache: `[2, S, 1, 1, width]`."""
    angles = rope(positions) if cache is None else cache.rotary(rope, positions)
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def rotated_heads(mixed: Tensor, rotation: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[S, B, heads, width]`, keys and values `[S, B, groups, width]`; queries and keys rotated.

    In the last dimension of `mixed` `[S, B, (heads + 2 groups) * width]` the rows of a group lie together: its queries,
    then its key and its value. Nothing returned is a view, so that the gradient of `mixed` is written once.
    """
    grouped = mixed.unflatten(-1, (groups, -1, rotation.shape[-1]))
    parts = grouped.split([grouped.shape[-2] - 2, 1, 1], dim=-2)
    query, key, value = (part.flatten(2, 3) for part in parts)
    return _rotated(query, *rotation), _rotated(key, *rotation), value.contiguous()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` `[S, B, heads, width]` turned; cos and sin `[S, 1, 1, width]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, layer: int, cache: KeyValueCache | None, scale: float | None = None
) -> Tensor:
    """Attention of `query` `[S, B, heads, head]` over `key` and `value` `[S, B, groups, head]`: `[S, B, heads * head]`.

    Causal by `scaled_dot_product_attention`: FlashAttention on a GPU, a fused kernel on a CPU. With a cache the queries
    are the newest positions; their keys and values are appended to those of this layer, and they attend to the
    positions that the cache makes visible.
    """
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    mask = None
    if cache is not None:
        key, value = cache.extend(layer, key, value)
        mask = cache.visible(query.shape[2], query.device)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.permute(2, 0, 1, 3).flatten(2)
