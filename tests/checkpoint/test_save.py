"""Saving while training continues, on one rank."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from stepped_engine import engine, one_more_steps, state, stepped

from calm_core.checkpoint import load as checkpoint
from calm_core.checkpoint import save as saver
from calm_core.checkpoint.folder import list_checkpoints, open_checkpoint
from calm_core.checkpoint.save import SavePolicy, Saver
from calm_core.distributed.topology import Topology
from calm_core.errors import UserError


@contextmanager
def writing_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writes wait for the event; it is set at the end in any case."""
    go, write = threading.Event(), saver.write_file

    def held(*arguments: object) -> str:
        assert go.wait(60)
        return write(*arguments)

    monkeypatch.setattr(saver, "write_file", held)
    try:
        yield go
    finally:
        go.set()


def test_what_is_written_is_what_was_there_when_asked(
    topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = stepped(topology, torch.float32)
    wanted = state(one)
    with Saver(tmp_path, one, SavePolicy(2)) as saves, writing_held(monkeypatch) as go:
        saves.save(3, {"updates": 3})
        one_more_steps(one, 2)
        assert saves.poll() is None
        assert list_checkpoints(tmp_path) == []
        with pytest.raises(RuntimeError, match="checkpoint 3 is still being written"):
            saves.save(5, {"updates": 5})
        go.set()
        assert saves.wait().path == tmp_path / "step-3"
        assert saves.wait() is None
        assert saves.poll() is None
    other = engine(topology, 1)
    checkpoint.load(open_checkpoint(tmp_path / "step-3"), other)
    assert all(map(torch.equal, state(other), wanted))
    assert not all(map(torch.equal, state(one), wanted))


def test_a_later_step_finds_it_complete(topology: Topology, tmp_path: Path) -> None:
    one = stepped(topology, torch.float32)
    with Saver(tmp_path, one, SavePolicy(1)) as saves:
        for step in (3, 4):
            saves.save(step, {"updates": step})
            while (saved := saves.poll()) is None:
                one_more_steps(one, 1)
            assert saved.step == step
            assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{step}"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]


def failing(code: int) -> Callable[..., Any]:
    """A function that ends in this error of the file system, whatever it is given."""

    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def saved(saves: Saver, step: int) -> Path:
    saves.save(step, {"updates": step})
    return saves.wait().path


@pytest.mark.parametrize("part", ["begin", "write_file", "finish"])
@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO", "ESTALE"])
def test_what_cannot_be_written_is_known_and_the_one_before_stays(
    topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, code: str
) -> None:
    """Space and permissions are for the user to fix; after another failure a retry may succeed."""
    number, retry = getattr(errno, code), code in ("EIO", "ESTALE")
    words = rf"step-4 could not be written \(.*{os.strerror(number)}\)" + ("" if retry else ": earlier .* are intact")
    with Saver(tmp_path, stepped(topology, torch.float32), SavePolicy(2)) as saves:
        saved(saves, 3)
        with monkeypatch.context() as patch:
            patch.setattr(saver, part, failing(number))
            with pytest.raises(RuntimeError if retry else UserError, match=words):
                saved(saves, 4)
        assert list_checkpoints(tmp_path) == [tmp_path / "step-3"]
        assert retry or [path.name for path in tmp_path.iterdir()] == ["step-3"]
        assert saved(saves, 4) == tmp_path / "step-4"
    assert {path.name for path in tmp_path.iterdir()} == {"step-3", "step-4"}
