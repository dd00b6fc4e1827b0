"""Atomic writes, and files that cannot be read."""

import builtins
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from calm_core.checkpoint import tensor_folder
from calm_core.checkpoint.folder import open_checkpoint
from calm_core.checkpoint.tensor_folder import TensorFolder
from calm_core.data.store import read_shard
from calm_core.distributed.collectives import on_first_rank
from calm_core.distributed.topology import Topology
from calm_core.errors import UserError
from calm_core.io import file_lock, read_json, remove_partial, replacing, require_writable, write_json, write_text


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_mode_of_the_umask_whatever_library_writes_them(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "weights.safetensors") as temporary:
            save_file({"w": torch.ones(3)}, temporary)
        write_json(tmp_path / "a.json", {"a": 1})
    finally:
        os.umask(before)
    for name in ("weights.safetensors", "a.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask
    assert load_file(tmp_path / "weights.safetensors")["w"].tolist() == [1, 1, 1]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud83d of a pair")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.json.host-1.partial").write_text("half")
    write_json(tmp_path / "a.json", {"name": "Zoë"})
    remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "a.json") == {"name": "Zoë"}


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Cannot write to .*file/run: .*file is a file"):
        require_writable(tmp_path / "file" / "run")


def test_a_lock_excludes_others_and_shared_ones_share(tmp_path: Path) -> None:
    with file_lock(tmp_path / "lock"), pytest.raises(BlockingIOError), file_lock(tmp_path / "lock", shared=True):
        pass
    with file_lock(tmp_path / "lock", shared=True), file_lock(tmp_path / "lock", shared=True):
        pass


def no_answer(*_: object, **__: object) -> Any:
    raise OSError(errno.ESTALE, "Stale file handle")


READERS: list[Callable[[Path], object]] = [read_json, read_shard, open_checkpoint, TensorFolder]


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_a_file_system_that_does_not_answer_is_no_mistake_of_the_user(
    read: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, topology: Topology
) -> None:
    """A `UserError` ends a job for good; what may pass must not."""
    with pytest.raises(UserError):
        on_first_rank(lambda: read(tmp_path / "missing"))
    for module, name in ((Path, "read_bytes"), (pa, "memory_map"), (builtins, "open")):
        monkeypatch.setattr(module, name, no_answer)
    with pytest.raises(OSError, match="Stale"):
        read(tmp_path / "missing")
    with pytest.raises(RuntimeError, match="Stale"):
        on_first_rank(lambda: read(tmp_path / "missing"))


def test_a_part_of_a_tensor_that_cannot_be_read_now_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run would resume from the checkpoint before."""
    content = {"w": {"shape": [2], "boxes": [["a.safetensors", [0], [2]]]}}
    write_json(tmp_path / "index.json", content)
    with pytest.raises(tensor_folder.DamagedError):
        TensorFolder(tmp_path).read("w")
    monkeypatch.setattr(tensor_folder, "safe_open", no_answer)
    with pytest.raises(OSError, match="Stale"):
        TensorFolder(tmp_path).read("w")
