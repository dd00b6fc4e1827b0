import json
import math
from pathlib import Path

import pytest

from calm_core.training.config import TrainingConfig
from calm_core.training.run_folder import RunFolder
from calm_core.training.run_log import RunLog, read_metrics


def opened(folder: Path, start: int) -> RunLog:
    return RunLog(RunFolder(folder), start, "calm", TrainingConfig(wandb="disabled"), {})


def test_a_resume_drops_the_steps_to_be_done_again_and_no_event(tmp_path: Path) -> None:
    log = opened(tmp_path, 0)
    log.write(0, "event", {"event": "start"})
    for step in (1, 2, 3):
        for kind in ("train", "eval", "sample"):
            log.write(step, kind, {})
    log.write(3, "event", {"event": "refused", "reason": "spike"})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "kind": "tr')  # killed while writing
    log = opened(tmp_path, 2)
    log.write(2, "event", {"event": "start"})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for kind in ("train", "eval", "sample"):
        assert [line["step"] for line in lines if line["kind"] == kind] == [1, 2]
    events = [line for line in lines if line["kind"] == "event"]
    assert [(event["step"], event["event"]) for event in events] == [(0, "start"), (3, "refused"), (2, "start")]
    assert sorted(event["time"] for event in events) == [event["time"] for event in events]


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    log = opened(tmp_path, 0)
    log.write(1, "eval", {"loss": math.nan, "curve": [1.0, math.inf], "of": {"one": -math.inf}, "brier_1": 0.5})
    log.close()

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert record == {
        "step": 1,
        "kind": "eval",
        "loss": None,
        "curve": [1.0, None],
        "of": {"one": None},
        "brier_1": 0.5,
    }


def test_nan_of_an_older_run_is_read_as_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "eval", "loss": NaN, "loss_error": -Infinity}\n')
    assert read_metrics(tmp_path / "metrics.jsonl", "eval") == [
        {"step": 1, "kind": "eval", "loss": None, "loss_error": None}
    ]
