"""Boxes against plain indexing."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from calm_core.checkpoint.boxes import Box, boxes_of_range

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
