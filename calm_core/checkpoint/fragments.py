"""The weights and optimizer state that ZeRO-1 assigns to this rank, as boxes of global tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from calm_core.distributed.engine import Engine
from calm_core.model.parameters import Piece, global_shape, named_parameters, pieces


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


WEIGHT = "weight"


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of this rank's flat tensor that are a box of a global tensor.

    Attributes:
        name: of the global tensor, without its kind.
        shape: of the global tensor.
        box: the block of the global tensor.
        group: index of the optimizer's parameter group.
        start: index of the first element in the group's flat tensor.
        mine: whether this rank writes it; all tensor-parallel ranks hold a tensor that is not split, the first writes.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    group: int
    start: int
    mine: bool

    def of(self, flat: Tensor) -> Tensor:
        """These elements of the group's flat tensor (a view)."""
        return flat.narrow(0, self.start, self.box.numel)


def fragments(model_parts: Sequence[MegatronModule]) -> Iterator[Fragment]:
    """What this rank's optimizer holds, once an engine has been made of the model parts."""
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    for name, parameter in named_parameters(model_parts):
        # DeepSpeed's record of where a parameter's elements (lp) lie in this rank's flat tensor (hp).
        mapping = parameter._hp_mapping
        if mapping is None:
            continue
        held, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
        for piece in pieces(name, parameter):
            begin, end = _range_of(piece, parameter)
            low, high = max(begin, held.start), min(end, held.start + held.numel)
            if low >= high:
                continue
            start = flat.start + low - held.start
            local, whole = piece.of(parameter), box_of(piece, parameter)
            for box in boxes_of_range(tuple(local.shape), low - begin, high - begin):
                shape = tuple(global_shape(piece, local))
                mine = first or piece.dim is not None
                yield Fragment(piece.name, shape, box.moved(whole.start), mapping.param_group_index, start, mine)
                start += box.numel


def box_of(piece: Piece, parameter: nn.Parameter) -> Box:
    """The box of the global tensor that this rank's model holds as `piece` of `parameter`."""
    shape = tuple(piece.of(parameter).shape)
    rank = parallel_state.get_tensor_model_parallel_rank()
    return Box(tuple(rank * size if dim == piece.dim else 0 for dim, size in enumerate(shape)), shape)


def flat_parts(engine: Engine) -> list[dict[str, Tensor]]:
    """What this rank's optimizer holds of each parameter group, float32 `[n]` each: the weights and its state.

    With AdamW: {"weight": ..., "exp_avg": ..., "exp_avg_sq": ...}.
    """
    flats = [group["params"][0] for group in engine.optimizer.param_groups]
    return [{WEIGHT: flat.detach(), **engine.optimizer.moments(flat)} for flat in flats]


class HostCopy:
    """Host memory for one copy of an engine's flat tensors, allocated once; pinned if they are on a GPU."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        pin = engine.topology.device.type == "cuda"
        self._parts = [
            {kind: torch.empty(flat.shape, pin_memory=pin) for kind, flat in part.items()}
            for part in flat_parts(engine)
        ]

    def take(self) -> list[dict[str, Tensor]]:
        """The flat tensors as they are now, valid until the next call."""
        for copy, part in zip(self._parts, flat_parts(self._engine), strict=True):
            for kind, flat in part.items():
                copy[kind].copy_(flat, non_blocking=True)
        if self._engine.topology.device.type == "cuda":
            torch.cuda.synchronize(self._engine.topology.device)
        return self._parts


def _range_of(piece: Piece, parameter: nn.Parameter) -> tuple[int, int]:
    """The range of elements of the flattened local parameter that are `piece`, which consists of whole rows."""
    if piece.view is None:
        return 0, parameter.numel()
    dim, first, count = piece.view
    if dim != 0:
        raise ValueError(f"{piece.name} does not consist of whole rows")
    row = prod(parameter.shape[1:])
    return first * row, (first + count) * row
