"""Boxes: blocks of a global tensor, in which checkpoints store it."""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Box:
    """A block of a global tensor: the indices at which it begins, and its shape."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return prod(self.shape)

    def moved(self, by: tuple[int, ...]) -> "Box":
        """The box of the same shape whose start is moved by an offset."""
        return Box(tuple(a + b for a, b in zip(self.start, by, strict=True)), self.shape)

    def overlap(self, other: "Box") -> "Box | None":
        """The intersection of two boxes, None if it is empty."""
        ends = zip(self.start, self.shape, other.start, other.shape, strict=True)
        sides = [(max(a, c), min(a + b, c + d)) for a, b, c, d in ends]
        if any(first >= last for first, last in sides):
            return None
        return Box(tuple(first for first, _ in sides), tuple(last - first for first, last in sides))

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """The slices that select this box from `outer`, which contains it."""
        offsets = (a - b for a, b in zip(self.start, outer.start, strict=True))
        return tuple(slice(offset, offset + length) for offset, length in zip(offsets, self.shape, strict=True))


def boxes_of_range(shape: tuple[int, ...], first: int, last: int) -> list[Box]:
    """The boxes that together are the elements `first` to `last - 1` of a tensor of `shape` in row-major order.

    A matrix has at most three: the end of a row, whole rows, the beginning of a row.
    """
    if first == last:
        return []
    if len(shape) == 1:
        return [Box((first,), (last - first,))]
    row = prod(shape[1:])
    (top, left), (bottom, right) = divmod(first, row), divmod(last, row)
    if top == bottom:
        return _in_row(top, shape, left, right)
    above = _in_row(top, shape, left, row) if left else []
    top += bool(left)
    whole = [Box((top, *(0 for _ in shape[1:])), (bottom - top, *shape[1:]))] if top < bottom else []
    return above + whole + _in_row(bottom, shape, 0, right)


def _in_row(index: int, shape: tuple[int, ...], first: int, last: int) -> list[Box]:
    return [Box((index, *box.start), (1, *box.shape)) for box in boxes_of_range(shape[1:], first, last)]
