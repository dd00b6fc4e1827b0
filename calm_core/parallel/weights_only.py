"""Checkpoints of weights alone, written and read as whole tensors, without a model and without ranks.

Runs start from one by `training.init_from` and generation reads one as any other. It has no moments, so that no run can
go on from it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from calm_core.errors import UserError
from calm_core.parallel.boxes import Box
from calm_core.parallel.checkpoint_folder import Checkpoint, DamagedError, begin, damaged_files, finish
from calm_core.parallel.tensor_folder import INDEX, Entry, TensorFolder, write_file, write_index

_WEIGHT = "weight/"
_FILE = "weights.safetensors"


def write_weights(final: Path, weights: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    """Write the checkpoint folder `final` (`step-N`), whole or not at all.

    Args:
        final: where to.
        weights: float32 tensors by their global names (`model.parameters`), gate and up projections apart.
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
            f"checkpoint {final} could not be written ({error}): free some room, or go elsewhere."
        ) from error


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All weights of a checkpoint, with moments or without, float32 on the CPU, by their global names.

    Raises:
        DamagedError: if a file is not as it was written.
    """
    if damaged := damaged_files(checkpoint, slice(None)):
        raise DamagedError(f"{damaged[0]} is missing or its bytes have changed: use another checkpoint.")
    source = TensorFolder(checkpoint.path / "tensors")
    return {name.removeprefix(_WEIGHT): source.read(name) for name in source.shapes if name.startswith(_WEIGHT)}


def _whole(name: str, shape: tuple[int, ...]) -> Entry:
    return Entry(_WEIGHT + name, shape, Box((0,) * len(shape), shape))
