"""Parameters under global names: the same name and the same values at any layout of ranks.

A parameter has its name in the whole model (layers counted over all stages). Tensor-parallel shards of a parameter are
slices of one global tensor; `pieces` lists them, and everything that must agree between layouts (initial weights,
checkpoints, parity tests, conversion) uses it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calm_core.model.noise import stream_seed

_LAYERS = "backbone.layers."

# Matrices that hold a gate and an up projection, one below the other; ranks divide each of the two separately.
_GATED = (".mlp.linear_fc1.", ".gate_up.")


@dataclass(frozen=True)
class Piece:
    """A slice of a local parameter that is one contiguous slice of a global tensor.

    Attributes:
        name: global name; the gate and the up projection of one matrix have a name each.
        view: the slice of the local tensor, as (dimension, start, length), or None for all of it.
        dim: the dimension that tensor-parallel ranks divide, None if every rank holds the tensor whole.
    """

    name: str
    view: tuple[int, int, int] | None
    dim: int | None

    def of(self, local: Tensor) -> Tensor:
        """This slice of a tensor shaped like the local parameter (a view)."""
        return local if self.view is None else local.narrow(*self.view)


def named_parameters(model_parts: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of this rank's model parts under its global name."""
    for part in model_parts:
        for name, parameter in part.named_parameters():
            yield _global_name(name, part), parameter


def pieces(name: str, parameter: nn.Parameter) -> list[Piece]:
    """The slices of global tensors that make up this rank's `parameter`."""
    dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
    if not any(matrix in name for matrix in _GATED):
        return [Piece(name, None, dim)]
    half = parameter.shape[0] // 2
    return [Piece(f"{name}.gate", (0, 0, half), dim), Piece(f"{name}.up", (0, half, half), dim)]


def initialize(model_parts: Sequence[nn.Module], std: float, seed: int) -> None:
    """Draw the initial weights: N(0, std^2) for matrices, 0 for biases, 1 for norms.

    With `std` 0 each matrix has its own, 1 / sqrt(inputs): its output has the scale of its input at any width.

    A module can set another start on a parameter: `starts_at_zero`, or its own standard deviation `initial_std`.

    Each tensor has its own stream, seeded by (seed, global name), so any layout starts from the same model. A stream
    can only be read from its beginning, so a rank that draws a tensor draws all of it: see `from_owners`. Collective.
    """

    def draw(piece: Piece, parameter: nn.Parameter) -> None:
        _initialize(piece, piece.of(parameter.data), parameter, std, seed)

    from_owners(model_parts, draw)


def from_owners(
    model_parts: Sequence[nn.Module], fill: Callable[[Piece, nn.Parameter], None], only: tuple[str, ...] = ("",)
) -> None:
    """Fill the parameters whose names begin with one of `only`; data-parallel ranks share the work. Collective.

    Each piece is filled by one of the data-parallel ranks that hold it and sent to the others. The next largest piece
    goes to the rank with the fewest elements so far, so a rank fills about its fraction of them.
    """
    group, rank, size = _data_group()
    held = [
        (piece, parameter)
        for name, parameter in named_parameters(model_parts)
        if name.startswith(only)
        for piece in pieces(name, parameter)
    ]
    filled = [0] * size
    with torch.no_grad():
        for piece, parameter in sorted(held, key=lambda each: each[0].of(each[1]).numel(), reverse=True):
            owner = filled.index(min(filled))
            filled[owner] += piece.of(parameter).numel()
            if owner == rank:
                fill(piece, parameter)
            if size > 1:
                dist.broadcast(piece.of(parameter.data), dist.get_global_rank(group, owner), group)


@torch.no_grad()
def gather(model_parts: Sequence[nn.Module], whole: nn.Module | None) -> None:
    """Copy the weights of a model that is spread over ranks into a network that rank 0 holds whole. Collective.

    Tensors are sent one at a time. The ranks of the first data-parallel replica, which includes rank 0, broadcast their
    slices of each in their model-parallel group; those of other replicas do nothing.

    Args:
        model_parts: what this rank holds of the model.
        whole: the network, with some or all of the model's parameters; None on every rank but 0.
    """
    from calm_core.megatron import parallel_state

    if parallel_state.get_data_parallel_rank():
        return
    group = parallel_state.get_model_parallel_group()
    held, wanted = _by_name(model_parts), _by_name([whole] if whole is not None else [])
    kinds = {name: (local.shape, local.dtype, dim) for name, (local, dim) in held.items()}
    ranks: list[tuple[dict[str, tuple[torch.Size, torch.dtype, int | None]], list[str]]]
    ranks = [({}, [])] * dist.get_world_size(group)
    dist.all_gather_object(ranks, (kinds, list(wanted)), group=group)
    device = next(iter(held.values()))[0].device
    for name in ranks[0][1]:
        holders = [rank for rank, (kinds, _) in enumerate(ranks) if name in kinds]
        shape, dtype, dim = ranks[holders[0]][0][name]
        slices = []
        for holder in holders if dim is not None else holders[:1]:
            own = holder == dist.get_rank(group)
            sent = held[name][0].contiguous() if own else torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(sent, dist.get_global_rank(group, holder), group)
            slices.append(sent)
        if whole is not None:
            wanted[name][0].copy_(slices[0] if dim is None else torch.cat(slices, dim))


def _by_name(model_parts: Sequence[nn.Module]) -> dict[str, tuple[Tensor, int | None]]:
    """The pieces of these model parts by global name: the values, and the dimension that ranks divide."""
    return {
        piece.name: (piece.of(parameter.data), piece.dim)
        for name, parameter in named_parameters(model_parts)
        for piece in pieces(name, parameter)
    }


def _data_group() -> tuple[dist.ProcessGroup | None, int, int]:
    """The group of data-parallel ranks, this rank's index in it and its size; (None, 0, 1) without groups."""
    if not dist.is_initialized():
        return None, 0, 1
    from calm_core.megatron import parallel_state

    if not parallel_state.is_initialized():
        return None, 0, 1
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group, dist.get_rank(group), dist.get_world_size(group)


def _initialize(piece: Piece, local: Tensor, parameter: nn.Parameter, std: float, seed: int) -> None:
    if getattr(parameter, "starts_at_zero", False):
        local.zero_()
    elif parameter.dim() < 2:
        local.fill_(0.0 if ".bias" in piece.name else 1.0)
    else:
        whole = torch.empty(global_shape(piece, local))
        own_std = getattr(parameter, "initial_std", std or whole.shape[1] ** -0.5)
        stream = stream_seed(seed, f"initial/{piece.name}", 0)
        whole.normal_(std=own_std, generator=torch.Generator().manual_seed(stream))
        local.copy_(own_shard(whole, piece.dim))


def global_shape(piece: Piece, local: Tensor) -> list[int]:
    """The shape of the global tensor that `local` is this rank's shard of."""
    shape = list(local.shape)
    if piece.dim is not None:
        from calm_core.megatron import parallel_state

        shape[piece.dim] *= parallel_state.get_tensor_model_parallel_world_size()
    return shape


def own_shard(whole: Tensor, dim: int | None) -> Tensor:
    """This tensor-parallel rank's slice of a global tensor."""
    if dim is None:
        return whole
    from calm_core.megatron import parallel_state

    ranks = parallel_state.get_tensor_model_parallel_world_size()
    return whole.chunk(ranks, dim)[parallel_state.get_tensor_model_parallel_rank()]


def _global_name(name: str, model_part: nn.Module) -> str:
    if not name.startswith(_LAYERS):
        return name
    if model_part.config.pipeline_model_parallel_size == 1:
        return name
    from calm_core.megatron import get_transformer_layer_offset

    index, rest = name.removeprefix(_LAYERS).split(".", 1)
    offset = get_transformer_layer_offset(model_part.config, vp_stage=model_part.vp_stage)
    return f"{_LAYERS}{int(index) + offset}.{rest}"
