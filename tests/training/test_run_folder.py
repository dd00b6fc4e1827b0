"""The lock of a run folder."""

import errno
from pathlib import Path

import pytest

from calm_core.errors import UserError
from calm_core.training.run_folder import RunFolder


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").locked():
        second = RunFolder(tmp_path / "run").locked()
        with pytest.raises(UserError, match="another run is training in"):
            second.__enter__()
    with RunFolder(tmp_path / "run").locked():
        pass


def test_without_locks_a_run_warns_and_continues(tmp_path: Path, monkeypatch, capsys) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with RunFolder(tmp_path / "run").locked():
        pass
    assert f"warning: {tmp_path}/run/.lock cannot be locked (No locks available)" in capsys.readouterr().err
