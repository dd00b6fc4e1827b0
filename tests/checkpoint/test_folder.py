import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_core.checkpoint.folder import (
    DamagedError,
    begin,
    damaged_files,
    finish,
    list_checkpoints,
    open_checkpoint,
    remove,
    retire,
)
from calm_core.errors import UserError

STATE = {"progress": {"step": 3, "consumed": 96}, "config": {"seed": 7, "rate": 1e-3}}


def save(folder: Path, step: int) -> Path:
    final = folder / f"step-{step}"
    partial = begin(final)
    (partial / "tensors" / "a").write_text("tensor")
    finish(partial, final, STATE, {"a": "checksum of a"})
    return final


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    found = open_checkpoint(path)
    assert (found.path, found.step, found.state, found.checksums) == (path, 3, STATE, {"a": "checksum of a"})


def test_the_steps_are_in_order_and_only_complete_ones(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        save(tmp_path, step)
    begin(tmp_path / "step-30")
    (tmp_path / "step-40").mkdir()
    (tmp_path / "step-5.deleting").mkdir()
    (tmp_path / "step-by-step").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-9", "step-20", "step-100"]


@given(st.data())
def test_any_changed_byte_of_the_manifest_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    manifest = save(tmp_path_factory.mktemp("c"), 3) / "manifest.json"
    values = json.loads(manifest.read_text())
    content = bytearray(manifest.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    manifest.write_bytes(content)
    try:
        same = json.loads(content) == values  # white space was changed
    except ValueError:
        same = False
    if not same:
        with pytest.raises(DamagedError, match=r"manifest\.json is damaged"):
            open_checkpoint(manifest.parent)


def test_another_format_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("calm_core.checkpoint.folder.FORMAT_VERSION", 9)
        path = save(tmp_path, 3)
    with pytest.raises(UserError, match="has checkpoint format 9, this version reads 2") as refused:
        open_checkpoint(path)
    assert not isinstance(refused.value, DamagedError)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a complete checkpoint: give a folder step-N"):
        open_checkpoint(tmp_path)


def test_what_is_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 9):
        save(tmp_path, step)
    begin(tmp_path / "step-5")
    (tmp_path / "step-1.deleting" / "tensors").mkdir(parents=True)
    (tmp_path / "step-2.mine").mkdir()
    doomed = retire(tmp_path / "step-4", keep=2)  # step 9 is of a time that did not come to be
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-3", "step-4", "step-9"]
    remove(doomed)
    assert {path.name for path in tmp_path.iterdir()} == {"step-2.mine", "step-3", "step-4", "step-9"}


def test_damaged_files_are_those_of_the_share(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    found = open_checkpoint(path)
    assert damaged_files(found, slice(0, None, 2)) == [path / "tensors" / "a"]
    assert damaged_files(found, slice(1, None, 2)) == []
