"""Tensors written in boxes by several ranks and read in others."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from calm_core.checkpoint.folder import DamagedError
from calm_core.checkpoint.tensor_folder import INDEX, Box, Entry, TensorFolder, boxes_of_range, write_file, write_index
from calm_core.io import hash_file

SHAPE = (6, 5)
WHOLE = torch.arange(30.0).view(SHAPE)


def write(folder: Path, cuts: list[int]) -> Path:
    """WHOLE in runs of elements that end at `cuts`, a file each, as ranks of ZeRO-1 hold it."""
    files = []
    for number, (first, last) in enumerate(zip([0, *cuts], [*cuts, 30], strict=True)):
        entries = [Entry("w", SHAPE, box) for box in boxes_of_range(SHAPE, first, last)]
        runs = WHOLE.flatten()[first:last].split([entry.box.numel for entry in entries])
        name = f"rank-{number}.safetensors"
        checksum = write_file(folder / name, list(zip(entries, runs, strict=True)))
        assert checksum == hash_file(folder / name)
        files.append((name, entries))
    assert write_index(folder, files) == hash_file(folder / INDEX)
    return folder


@settings(max_examples=20)  # each writes and syncs files
@given(st.lists(st.integers(0, 30), max_size=4).map(sorted), st.data())
def test_any_box_comes_from_any_cuts(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], data: st.DataObject
) -> None:
    source = TensorFolder(write(tmp_path_factory.mktemp("t"), cuts))
    rows, columns = (sorted(data.draw(st.integers(0, n)) for _ in range(2)) for n in SHAPE)
    box = Box((rows[0], columns[0]), (rows[1] - rows[0], columns[1] - columns[0]))
    assert torch.equal(source.read("w", box), WHOLE[rows[0] : rows[1], columns[0] : columns[1]])
    assert torch.equal(source.read("w"), WHOLE)
    assert source.shapes == {"w": SHAPE}


def test_the_files_are_safetensors(tmp_path: Path) -> None:
    tensors = load_file(write(tmp_path, [15]) / "rank-1.safetensors")
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"w@3,0": WHOLE[3:].tolist()}


def test_what_is_not_there_is_not_made_up(tmp_path: Path) -> None:
    write_index(tmp_path, [("a", [Entry("w", SHAPE, Box((0, 0), (5, 5)))])])
    write_file(tmp_path / "a", [(Entry("w", SHAPE, Box((0, 0), (5, 5))), torch.zeros(25))])
    assert torch.equal(TensorFolder(tmp_path).read("w", Box((0, 0), (5, 4))), torch.zeros(5, 4))
    with pytest.raises(DamagedError, match="does not hold all of w"):
        TensorFolder(tmp_path).read("w")


@pytest.mark.parametrize("content", [b"", b"{", b'{"w": {}}', b'{"w": {"shape": [2], "boxes": [1]}}', b"[1]"])
def test_an_index_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(DamagedError, match=r"index\.json is not an index of tensors"):
        TensorFolder(tmp_path)


def test_a_file_that_is_no_safetensors_file_or_out_of_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path, [])
    (folder / "rank-0.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(DamagedError, match=r"rank-0\.safetensors is not readable"):
        TensorFolder(folder).read("w")
    write_index(folder, [("../../a", [Entry("w", SHAPE, Box((0, 0), SHAPE))])])
    with pytest.raises(DamagedError, match=rf"{folder}/a is not readable"):
        TensorFolder(folder).read("w")


shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    sides = [sorted((draw(st.integers(0, n - 1)), draw(st.integers(0, n - 1)))) for n in shape]
    return Box(tuple(a for a, _ in sides), tuple(b - a + 1 for a, b in sides))


def of(box: Box, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[box.within(Box((0,) * tensor.dim(), tuple(tensor.shape)))]


@given(st.data(), shapes)
def test_a_range_is_its_boxes_one_after_the_other(data: st.DataObject, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    first, last = sorted(data.draw(st.integers(0, tensor.numel())) for _ in range(2))
    found = boxes_of_range(shape, first, last)
    assert [int(x) for box in found for x in of(box, tensor).flatten()] == list(range(first, last))
    assert [box.numel for box in found] == [of(box, tensor).numel() for box in found]
    assert len(found) <= 2 * len(shape) - 1


@given(st.data(), shapes)
def test_the_overlap_is_what_two_boxes_have_in_common(data: st.DataObject, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    one, other = data.draw(boxes(shape)), data.draw(boxes(shape))
    common = set(of(one, tensor).flatten().tolist()) & set(of(other, tensor).flatten().tolist())
    overlap = one.overlap(other)
    assert (set(of(overlap, tensor).flatten().tolist()) if overlap else set()) == common
    if overlap:
        assert torch.equal(of(one, tensor)[overlap.within(one)], of(overlap, tensor))


def test_a_box_further_on() -> None:
    assert Box((1, 2), (3, 4)).moved((0, 8)) == Box((1, 10), (3, 4))
