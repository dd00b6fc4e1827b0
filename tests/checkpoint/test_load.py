"""Checkpoints against an engine of another shape or precision, on one rank."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from launching import ROOT, launch
from stepped_engine import engine, model, one_more_steps, state, stepped

from calm_core.checkpoint import load as checkpoint
from calm_core.checkpoint.folder import open_checkpoint
from calm_core.distributed.topology import Topology
from calm_core.errors import UserError
from calm_core.model.parameters import named_parameters


@pytest.fixture
def saved(topology: Topology, tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path, 3, stepped(topology, torch.float32), {"updates": 3}, keep=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_of_an_engine_comes_back_bitwise(topology: Topology, tmp_path: Path, dtype: torch.dtype) -> None:
    first, second = stepped(topology, dtype), engine(topology, 1, dtype)
    path = checkpoint.save(tmp_path, 3, first, {"updates": 3}, keep=2)
    assert not all(map(torch.equal, state(first), state(second)))
    checkpoint.load(open_checkpoint(path), second)
    assert all(map(torch.equal, state(first), state(second)))
    one_more_steps(first, 2)
    one_more_steps(second, 2)
    assert all(map(torch.equal, state(first), state(second)))


@pytest.mark.parametrize(("code", "kind"), [(errno.EIO, RuntimeError), (errno.EACCES, UserError)])
def test_what_cannot_be_read_is_no_damage(
    saved: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    def unreadable(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoint, "damaged_files", unreadable)
    with pytest.raises(kind, match=os.strerror(code)) as refused:
        checkpoint.verify(open_checkpoint(saved))
    assert refused.type is kind


def test_weights_alone(topology: Topology, saved: Path) -> None:
    other = model(1)
    names = checkpoint.load_weights(open_checkpoint(saved), [other])
    assert names == [name for name, _ in named_parameters([other])]
    wanted = stepped(topology, torch.float32).model_parts[0]
    assert all(map(torch.equal, other.parameters(), wanted.parameters()))


def test_a_part_of_the_weights(topology: Topology, saved: Path) -> None:
    other, before, wanted = model(1), model(1), stepped(topology, torch.float32).model_parts[0]
    names = checkpoint.load_weights(open_checkpoint(saved), [other], only=("backbone.",))
    assert all(name.startswith("backbone.") for name in names)
    for (name, found), old, new in zip(other.named_parameters(), before.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(found, new if name.startswith("backbone.") else old)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ffn": 32}, r"holds weight/backbone\.layers\.0\.mlp\.linear_fc1\.weight\.gate with shape \(24, 16\) where"),
        ({"layers": 3}, r"has no tensor weight/backbone\.layers\.2\.\S+: it holds a model of another shape"),
    ],
)
def test_another_shape_is_refused_and_named(
    topology: Topology, saved: Path, changes: dict[str, int], words: str
) -> None:
    other = engine(topology, 1, **changes)
    before = state(other)
    with pytest.raises(UserError, match=words):
        checkpoint.load(open_checkpoint(saved), other)
    assert all(map(torch.equal, before, state(other)))


def test_data_parallel_ranks_share_the_drawing_and_the_reading_of_weights(tmp_path: Path) -> None:
    launch(2, ROOT / "tests" / "helpers" / "startup_walk.py", tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    whole = ranks[0]["parameters"]
    assert all(rank["equal"] for rank in ranks)  # loaded as they were saved
    assert sum(rank["filled"] for rank in ranks) == whole
    assert max(rank["filled"] for rank in ranks) < 0.6 * whole
    assert sum(rank["read"] for rank in ranks) == 12 * whole  # float32 weights and two moments, each once
    assert max(rank["read"] for rank in ranks) < 0.6 * 12 * whole
