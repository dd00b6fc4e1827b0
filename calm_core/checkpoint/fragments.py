"""The weights and optimizer state that ZeRO-1 assigns to this rank, as boxes of global tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from calm_core.checkpoint.tensor_folder import Box, boxes_of_range
from calm_core.distributed.engine import Engine
from calm_core.model.parameters import Piece, global_shape, named_parameters, pieces

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
