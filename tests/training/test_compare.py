import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from calm_core.errors import ExitCode, UserError
from calm_core.training.compare import Difference, first_difference

SCRIPT = Path(__file__).parents[2] / "pretrain" / "compare_runs.py"


def run(folder: Path, *records: dict[str, Any]) -> Path:
    folder.mkdir()
    lines = [json.dumps({"step": step, "kind": "train", **record}) for step, record in enumerate(records, 1)]
    lines.append(json.dumps({"step": 1, "kind": "event", "event": "start"}))
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def test_the_first_step_and_key_that_differ(tmp_path: Path) -> None:
    one = run(tmp_path / "a", {"loss": 3.0}, {"loss": 2.0, "norm": 1.0, "mfu": 0.1}, {"loss": 1.0})
    other = run(tmp_path / "b", {"loss": 3.0}, {"loss": 2.0, "norm": 1.01, "mfu": 0.2})
    assert first_difference(one, other, 0.0) == Difference(2, "train", "norm", 1.0, 1.01)
    assert first_difference(one, other, 0.02) is None
    assert first_difference(one, one, 0.0) is None


def test_a_loss_that_was_not_finite_differs_from_one_that_was(tmp_path: Path) -> None:
    one, other = run(tmp_path / "a", {"loss": None}), run(tmp_path / "b", {"loss": 1.0})
    assert first_difference(one, other, 9.0) == Difference(1, "train", "loss", None, 1.0)
    assert first_difference(one, one, 0.0) is None


def test_a_key_that_one_lacks(tmp_path: Path) -> None:
    one, other = run(tmp_path / "a", {}), run(tmp_path / "b", {"loss": 1.0})
    assert first_difference(one, other, 0.0) == Difference(1, "train", "loss", None, 1.0)


def test_nothing_to_compare(tmp_path: Path) -> None:
    one, other = run(tmp_path / "a", {"loss": 1.0}), run(tmp_path / "b")
    with pytest.raises(UserError, match="no recorded step in common"):
        first_difference(one, other, 0.0)
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        first_difference(one, tmp_path, 0.0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare = runpy.run_path(str(SCRIPT))["compare"]
    one, other = run(tmp_path / "a", {"loss": 1.0}), run(tmp_path / "b", {"loss": 1.5})
    assert compare([str(one), str(other)]) == ExitCode.FAILED
    assert f"step 1 (train): loss is 1.0 in {one}" in capsys.readouterr().out
    assert compare([str(one), str(other), "--tolerance", "0.5"]) == ExitCode.OK
    assert "no difference" in capsys.readouterr().out
