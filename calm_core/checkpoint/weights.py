"""Weights of a whole model, read and written by one process without process groups: for inference and conversion."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calm_core.checkpoint.folder import Checkpoint, DamagedError, begin, damaged_files, finish
from calm_core.checkpoint.tensor_folder import INDEX, Box, Entry, TensorFolder, write_file, write_index
from calm_core.errors import UserError
from calm_core.model.parameters import named_parameters, pieces

_WEIGHT = "weight/"

_FILE = "weights.safetensors"


def write_weights(final: Path, weights: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    """Write the checkpoint folder `final` (`step-N`), completely or not at all.

    Args:
        final: the folder to write.
        weights: float32 tensors by their global names (`model.parameters`), gate and up projections separately.
        state: plain values of the manifest.

    Raises:
        UserError: if it cannot be written.
    """
    contents = [(_whole(name, tuple(weight.shape)), weight.flatten()) for name, weight in weights.items()]
    try:
        partial = begin(final)
        checksum = write_file(partial / "tensors" / _FILE, contents)
        index = write_index(partial / "tensors", [(_FILE, [entry for entry, _ in contents])])
        finish(partial, final, state, {INDEX: index, _FILE: checksum})
    except OSError as error:
        raise UserError(
            f"checkpoint {final} could not be written ({error}): free some space, or choose another folder."
        ) from error


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All weights of a checkpoint, with or without optimizer state, float32 on the CPU, by their global names.

    Raises:
        DamagedError: if a file is not as it was written.
    """
    source = _undamaged(checkpoint)
    return {name.removeprefix(_WEIGHT): source.read(name) for name in source.shapes if name.startswith(_WEIGHT)}


def _whole(name: str, shape: tuple[int, ...]) -> Entry:
    return Entry(_WEIGHT + name, shape, Box((0,) * len(shape), shape))


def load_whole_model(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Put the weights of a checkpoint into a model that this process holds whole, in the model's precision.

    Raises:
        DamagedError: if a file is not as it was written.
        UserError: if the model has another shape.
    """
    source = _undamaged(checkpoint)
    for name, parameter in named_parameters([model]):
        for piece in pieces(name, parameter):
            found, wanted = source.shapes.get(_WEIGHT + piece.name), tuple(piece.of(parameter).shape)
            if found != wanted:
                raise UserError(
                    f"{checkpoint.path} holds {_WEIGHT}{piece.name} with shape {found} where its configuration wants "
                    f"{wanted}: use another checkpoint."
                )
    fill(model, lambda name: source.read(_WEIGHT + name))


def fill(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Put weights into a model that this process holds whole; `read` gives those of a global name."""
    for name, parameter in named_parameters([model]):
        parameter.data.copy_(torch.cat([read(piece.name) for piece in pieces(name, parameter)]))


def _undamaged(checkpoint: Checkpoint) -> TensorFolder:
    if damaged := damaged_files(checkpoint, slice(None)):
        raise DamagedError(f"{damaged[0]} is missing or its bytes have changed: use another checkpoint.")
    return TensorFolder(checkpoint.path / "tensors")
