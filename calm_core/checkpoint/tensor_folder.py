"""The tensors of a checkpoint: safetensors files with boxes of global tensors, and an index of the boxes.

There is one file for each rank that wrote; `index.json` says which box of which tensor each file holds. On reading, any
box of any tensor is assembled from them, so the layout that reads need not be the one that wrote.
Nothing is unpickled. A process that holds a whole model reads and writes its weights here, without process groups.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from calm_core.checkpoint.folder import Checkpoint, DamagedError, begin, damaged_files, finish
from calm_core.errors import UserError
from calm_core.io import hash_bytes, may_pass, new_hash, sync
from calm_core.model.parameters import named_parameters, pieces

INDEX = "index.json"

_ALIGNMENT = 8

_AT_ONCE = 1 << 24  # bytes

_WEIGHT = "weight/"

_FILE = "weights.safetensors"


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


@dataclass(frozen=True)
class Entry:
    """A box of a global tensor: the tensor's name and shape, and the box."""

    name: str
    shape: tuple[int, ...]
    box: Box

    @property
    def key(self) -> str:
        """The name of the box within its file."""
        return f"{self.name}@{','.join(map(str, self.box.start))}"


def write_file(path: Path, contents: Sequence[tuple[Entry, Tensor]]) -> str:
    """Write boxes of float32 elements (each flat, on the host) as a safetensors file, synced; its content hash."""
    header, offset = {}, 0
    for entry, tensor in contents:
        end = offset + 4 * tensor.numel()
        header[entry.key] = {"dtype": "F32", "shape": entry.box.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest = new_hash()
    with open(path, "wb") as file:
        for block in (len(text).to_bytes(8, "little"), text, *(memoryview(t.numpy()).cast("B") for _, t in contents)):
            for start in range(0, len(block), _AT_ONCE):
                part = block[start : start + _AT_ONCE]
                digest.update(part)
                file.write(part)
    sync(path)
    return digest.hexdigest()


def write_index(folder: Path, files: Iterable[tuple[str, Sequence[Entry]]]) -> str:
    """Write the index of the boxes in each file, synced; its content hash."""
    index: dict[str, dict[str, Any]] = {}
    for file, entries in files:
        for entry in entries:
            tensor = index.setdefault(entry.name, {"shape": entry.shape, "boxes": []})
            tensor["boxes"].append([file, entry.box.start, entry.box.shape])
    content = json.dumps(index).encode()
    (folder / INDEX).write_bytes(content)
    sync(folder / INDEX)
    return hash_bytes(content)


class TensorFolder:
    """Reads a folder of tensors.

    Attributes:
        shapes: of each global tensor, by name.
    """

    def __init__(self, folder: Path) -> None:
        """Read the index; raises DamagedError if it is none."""
        self._folder = folder
        self._files: dict[str, Any] = {}
        try:
            index = json.loads((folder / INDEX).read_bytes())
            self.shapes = {name: tuple(tensor["shape"]) for name, tensor in index.items()}
            self._boxes = {
                name: {Box(tuple(start), tuple(shape)): file for file, start, shape in tensor["boxes"]}
                for name, tensor in index.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if may_pass(error):
                raise
            raise DamagedError(
                f"{folder / INDEX} is not an index of tensors ({error}): use another checkpoint."
            ) from error

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """A box of the tensor `name`, all of it by default: float32 on the host.

        Raises:
            DamagedError: if the files do not hold all of it.
        """
        box = box or Box((0,) * len(self.shapes[name]), self.shapes[name])
        wanted, missing = torch.empty(box.shape), box.numel
        for stored, file in self._boxes[name].items():
            if common := box.overlap(stored):
                wanted[common.within(box)] = self._part(file, Entry(name, (), stored).key, common.within(stored))
                missing -= common.numel
        if missing:
            raise DamagedError(f"{self._folder} does not hold all of {name}: use another checkpoint.")
        return wanted

    def _part(self, file: str, key: str, part: tuple[slice, ...]) -> Tensor:
        path = self._folder / Path(file).name
        try:
            if file not in self._files:
                self._files[file] = safe_open(path, framework="pt")
            return self._files[file].get_slice(key)[part]
        except (OSError, SafetensorError) as error:
            if may_pass(error):
                raise
            raise DamagedError(f"{path} is not readable ({error}): use another checkpoint.") from error


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
                    f"{checkpoint.path} holds {_WEIGHT}{piece.name} with shape {found} where its configuration needs "
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
