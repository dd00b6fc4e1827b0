"""Checkpoints that any layout of ranks can read: float32 weights and optimizer state under global names.

Each rank writes what ZeRO-1 assigns to it (see `save`); on reading, a rank assembles what it needs from
the boxes in all files (see `tensor_folder`). How the folder becomes a complete checkpoint: see `folder`.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from calm_core.checkpoint.folder import Checkpoint, DamagedError, damaged_files
from calm_core.checkpoint.save import WEIGHT, SavePolicy, Saver, box_of, explain_file_errors, flat_parts, fragments
from calm_core.checkpoint.tensor_folder import TensorFolder
from calm_core.distributed.collectives import on_every_rank, own_share
from calm_core.distributed.engine import Engine
from calm_core.errors import UserError
from calm_core.megatron import MegatronModule, parallel_state
from calm_core.model.parameters import Piece, from_owners, global_shape, named_parameters, pieces


def save(folder: Path, step: int, engine: Engine, state: dict[str, Any], keep: int) -> Path:
    """Write checkpoint `step-{step}` into `folder` and delete all but the newest `keep`. Collective.

    Raises:
        UserError: if the checkpoint cannot be written; those before it stay.
    """
    with Saver(folder, engine, SavePolicy(keep)) as saver:
        saver.save(step, state)
        return saver.wait().path


def load(checkpoint: Checkpoint, engine: Engine) -> None:
    """Load weights and optimizer state of a checkpoint, written by any layout, into the engine. Collective.

    Each rank reads what ZeRO-1 assigns to it, weights and state; the ranks that hold the same parameters then exchange
    what they have read.

    Raises:
        DamagedError: if a file is not as it was written; nothing is loaded.
        UserError: if the model has another shape; nothing is loaded.
    """
    flats, own = flat_parts(engine), list(fragments(engine.model_parts))
    state = [(f"{kind}/{fragment.name}", fragment.shape) for fragment in own for kind in flats[fragment.group]]
    source = _open(checkpoint, [*_weights_of(engine.model_parts), *state])
    held = {
        piece.name: (piece.of(parameter.data), box_of(piece, parameter))
        for name, parameter in named_parameters(engine.model_parts)
        for piece in pieces(name, parameter)
    }

    def read_own() -> None:
        for local, _ in held.values():
            local.zero_()
        for fragment in own:
            for kind, flat in flats[fragment.group].items():
                fragment.of(flat).copy_(source.read(f"{kind}/{fragment.name}", fragment.box).flatten())
            local, whole = held[fragment.name]
            local[fragment.box.within(whole)] = fragment.of(flats[fragment.group][WEIGHT]).view(fragment.box.shape)

    on_every_rank(read_own)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for _, parameter in named_parameters(engine.model_parts):
        # Every byte is 0 on all ranks but the one that has read it, so that the sum of the bytes is the tensor.
        dist.all_reduce(parameter.data.view(torch.uint8), group=group)
    engine.optimizer.set_update_count(checkpoint.state["updates"])


def load_weights(
    checkpoint: Checkpoint, model_parts: Sequence[MegatronModule], only: tuple[str, ...] = ("",)
) -> list[str]:
    """Load the weights alone into model parts, in their own precision; the names of what was loaded. Collective.

    Args:
        checkpoint: the checkpoint to read.
        model_parts: parts of the model, before an engine is made of them.
        only: load only the parameters whose global names begin with one of these.

    Raises:
        DamagedError: if a file is not as it was written; nothing is loaded.
        UserError: if the model has another shape; nothing is loaded.
    """
    source = _open(checkpoint, _weights_of(model_parts, only))

    def read(piece: Piece, parameter: nn.Parameter) -> None:
        piece.of(parameter.data).copy_(source.read(f"{WEIGHT}/{piece.name}", box_of(piece, parameter)))

    from_owners(model_parts, read, only)
    return [name for name, _ in named_parameters(model_parts) if name.startswith(only)]


def verify(checkpoint: Checkpoint) -> None:
    """Compare every file with its checksum; the ranks divide the files among them. Collective.

    Raises:
        DamagedError: naming the first file that is missing or changed.
        UserError: if a file may not be read.
    """
    compare = explain_file_errors(
        lambda: damaged_files(checkpoint, own_share()),
        f"{checkpoint.path} could not be read",
        "make its files readable",
    )
    if damaged := sorted(chain.from_iterable(on_every_rank(compare))):
        raise DamagedError(f"{damaged[0]} is missing or its bytes have changed: use another checkpoint.")


def full_weights(engine: Engine) -> dict[str, Tensor]:
    """The float32 master weights of a model without tensor or pipeline parallelism, by global name. Collective."""
    return {name: safe_get_full_fp32_param(p).cpu() for name, p in named_parameters(engine.model_parts)}


Wanted = Sequence[tuple[str, tuple[int, ...]]]  # names and shapes of global tensors


def _weights_of(model_parts: Sequence[MegatronModule], only: tuple[str, ...] = ("",)) -> Wanted:
    """The weights that these model parts consist of."""
    return [
        (f"{WEIGHT}/{piece.name}", tuple(global_shape(piece, piece.of(parameter))))
        for name, parameter in named_parameters(model_parts)
        if name.startswith(only)
        for piece in pieces(name, parameter)
    ]


def _open(checkpoint: Checkpoint, wanted: Wanted) -> TensorFolder:
    """The tensors of a checkpoint, verified to be whole and to include what each rank needs. Collective."""
    verify(checkpoint)

    def open_checked() -> TensorFolder:
        source = TensorFolder(checkpoint.path / "tensors")
        for name, shape in wanted:
            _check_shape(checkpoint.path, name, source.shapes, shape)
        return source

    opened: list[TensorFolder] = []
    on_every_rank(lambda: opened.append(open_checked()))
    return opened[0]


def _check_shape(path: Path, name: str, saved: dict[str, tuple[int, ...]], wanted: tuple[int, ...]) -> None:
    kind = name.partition("/")[0]
    if not any(known.startswith(f"{kind}/") for known in saved):
        raise UserError(
            f"{path} holds no optimizer state {kind}: it was written by another optimizer, or without its state; start "
            "from its weights by training.init_from."
        )
    if name not in saved:
        raise UserError(f"{path} has no tensor {name}: it holds a model of another shape.")
    if saved[name] != wanted:
        raise UserError(
            f"{path} holds {name} with shape {saved[name]} where this configuration needs {wanted}: "
            "set the model's shape as in the checkpoint's configuration."
        )
