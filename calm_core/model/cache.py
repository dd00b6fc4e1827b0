"""Keys and values of earlier positions, so that continuing a sequence does not compute them again."""

from collections.abc import Callable

import torch
from torch import Tensor


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
