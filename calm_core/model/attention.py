"""Self-attention between its two matrices: heads, rotary position embedding, and the cache of keys and values."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyValueCache:
    """Keys and values of all earlier positions, one pair per layer, each `[B, groups, capacity, d/heads]`."""

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new positions of one layer, `[B, groups, S_new, head]`, and return all positions so far."""
        end = self.length + key.shape[2]
        keys, values = self._layers.get(layer, (None, None))
        if keys is None or keys.shape[2] < end:
            keys, values = (_grown(old, new, end) for old, new in ((keys, key), (values, value)))
            self._layers[layer] = (keys, values)
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, positions: int) -> None:
        """Add `positions` to the length, after every layer has been extended by them."""
        self.length += positions

    def rotary(self, rope: Callable[..., Tensor], new: int) -> Tensor:
        """The rotary embedding `[new, 1, 1, head]` of `new` positions that follow the cached ones."""
        return rope(new, offset=self.length)

    def visible(self, new: int, device: torch.device) -> Tensor:
        """Attention mask `[new, cached + new]`: a new position attends to cached ones and to new ones up to itself."""
        return torch.ones(new, self.length + new, dtype=torch.bool, device=device).tril(diagonal=self.length)


class BranchingCache(KeyValueCache):
    """A cache of one sequence with R branches, which continue it from chosen positions independently of each other.

    The sequence is stored once, and the branches are further positions of it: each step of all branches takes one pass,
    without copies of the sequence.
    """

    def __init__(self) -> None:
        super().__init__()
        self._starts: Tensor | None = None
        self._trunk = 0

    def branch(self, starts: Tensor) -> None:
        """Start R branches, one position of each in every later pass; branch r follows position `starts[r]`, `[R]`.

        Branches of an earlier call are dropped.
        """
        if self._starts is not None:
            self.length = self._trunk
        self._starts, self._trunk = starts, self.length

    def rotary(self, rope: Callable[..., Tensor], new: int) -> Tensor:
        """As in the base class; the positions of a branch count from its start."""
        if self._starts is None:
            return super().rotary(rope, new)
        return rope(self._trunk + self._steps + 1)[self._starts + 1 + self._steps]

    def visible(self, new: int, device: torch.device) -> Tensor:
        """As in the base class; a branch attends to the sequence up to its start and to its own positions."""
        if self._starts is None:
            return super().visible(new, device)
        shared = torch.arange(self._trunk, device=device) <= self._starts.unsqueeze(1)
        own = torch.eye(new, dtype=torch.bool, device=device).repeat(1, self._steps + 1)
        return torch.cat([shared, own], dim=1)

    @property
    def _steps(self) -> int:
        """Positions cached for each branch."""
        return (self.length - self._trunk) // len(self._starts)


def _grown(old: Tensor | None, new: Tensor, length: int) -> Tensor:
    """`old` in a buffer twice as long as `length` needs, so that copying costs a constant per position."""
    batch, groups, _, width = new.shape
    buffer = new.new_empty(batch, groups, max(64, 2 * length), width)
    if old is not None:
        buffer[:, :, : old.shape[2]] = old
    return buffer


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
