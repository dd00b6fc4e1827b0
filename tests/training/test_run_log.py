import errno
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from calm_core.config.training_config import TrainingConfig
from calm_core.errors import ExitCode, UserError
from calm_core.training.run_log import (
    Difference,
    RunFolder,
    RunLog,
    Trackers,
    first_difference,
    read_metrics,
    samples_of_step,
)


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
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'7\n{"step": 1, "kind": "tr\xff')  # damaged, and cut short by a kill
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
        pytest.fail(f"{name} is not JSON")

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


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Ten steps: 8 samples each, 6 since a resume at step 4, after attempts from steps 7 and 4 that are done again."""
    starts = [(0, 0, 8), (7, 56, 2), (4, 32, 3), (4, 32, 6)]
    records = [
        {"step": step, "kind": "event", "event": "start", "samples": samples, "global_batch": batch}
        for step, samples, batch in starts
    ]
    records += [{"step": step, "kind": "train"} for step in (5, 10)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return tmp_path


@pytest.mark.parametrize(
    ("step", "samples"), [(1, range(8)), (4, range(24, 32)), (5, range(32, 38)), (10, range(62, 68))]
)
def test_samples_follow_the_batch_size_of_their_time(run, step, samples):
    assert samples_of_step(run, step) == samples


def test_steps_partition_the_samples(run):
    together = [sample for step in range(1, 11) for sample in samples_of_step(run, step)]
    assert together == list(range(68))


@pytest.mark.parametrize("step", [0, -1, 11])
def test_a_step_that_was_not_taken_is_refused(run, step):
    with pytest.raises(UserError, match="steps 1 to 10"):
        samples_of_step(run, step)


SCRIPT = Path(__file__).parents[2] / "pretrain" / "compare_runs.py"


def compare_runs(folder: Path, *records: dict[str, Any]) -> Path:
    folder.mkdir()
    lines = [json.dumps({"step": step, "kind": "train", **record}) for step, record in enumerate(records, 1)]
    lines.append(json.dumps({"step": 1, "kind": "event", "event": "start"}))
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def test_the_first_step_and_key_that_differ(tmp_path: Path) -> None:
    one = compare_runs(tmp_path / "a", {"loss": 3.0}, {"loss": 2.0, "norm": 1.0, "mfu": 0.1}, {"loss": 1.0})
    other = compare_runs(tmp_path / "b", {"loss": 3.0}, {"loss": 2.0, "norm": 1.01, "mfu": 0.2})
    assert first_difference(one, other, 0.0) == Difference(2, "train", "norm", 1.0, 1.01)
    assert first_difference(one, other, 0.02) is None
    assert first_difference(one, one, 0.0) is None


def test_a_loss_that_was_not_finite_differs_from_one_that_was(tmp_path: Path) -> None:
    one, other = compare_runs(tmp_path / "a", {"loss": None}), compare_runs(tmp_path / "b", {"loss": 1.0})
    assert first_difference(one, other, 9.0) == Difference(1, "train", "loss", None, 1.0)
    assert first_difference(one, one, 0.0) is None


def test_a_key_that_one_lacks(tmp_path: Path) -> None:
    one, other = compare_runs(tmp_path / "a", {}), compare_runs(tmp_path / "b", {"loss": 1.0})
    assert first_difference(one, other, 0.0) == Difference(1, "train", "loss", None, 1.0)


def test_nothing_to_compare(tmp_path: Path) -> None:
    one, other = compare_runs(tmp_path / "a", {"loss": 1.0}), compare_runs(tmp_path / "b")
    with pytest.raises(UserError, match="no recorded step in common"):
        first_difference(one, other, 0.0)
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        first_difference(one, tmp_path, 0.0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare = runpy.run_path(str(SCRIPT))["compare"]
    one, other = compare_runs(tmp_path / "a", {"loss": 1.0}), compare_runs(tmp_path / "b", {"loss": 1.5})
    assert compare([str(one), str(other)]) == ExitCode.FAILED
    assert f"step 1 (train): loss is 1.0 in {one}" in capsys.readouterr().out
    assert compare([str(one), str(other), "--tolerance", "0.5"]) == ExitCode.OK
    assert "no difference" in capsys.readouterr().out


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


TENSORBOARD = TrainingConfig(wandb="disabled", tensorboard=True)


def log(folder: Path, start: int, end: int, shift: float = 0.0) -> None:
    """Steps after `start` up to `end`, an evaluation and a sample at the end."""
    run = RunLog(RunFolder(folder), start, "calm", TENSORBOARD, {})
    run.write(start, "event", {"event": "start", "ranks": 1})
    for step in range(start + 1, end + 1):
        run.write(step, "train", {"loss": step + shift, "mfu": None, "gradient_norm": float("nan")})
    run.write(end, "eval", {"brier_1": 0.5 + shift, "measure": "a text"})
    run.write(end, "sample", {"temperature": 0.5, "prompt": "The", "text": " end"})
    run.close()


def test_tensorboard_reads_what_metrics_jsonl_has_also_after_a_resume(tmp_path: Path) -> None:
    log(tmp_path, 0, 5)
    log(tmp_path, 3, 6, shift=0.25)  # from the checkpoint of step 3
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(found.Tags()["scalars"]) == {"train/loss", "eval/brier_1"}
    for tag, kind, name in (("train/loss", "train", "loss"), ("eval/brier_1", "eval", "brier_1")):
        expected = [(record["step"], record[name]) for record in read_metrics(tmp_path / "metrics.jsonl", kind)]
        assert [(event.step, event.value) for event in found.Scalars(tag)] == expected, tag
    [tag] = found.Tags()["tensors"]
    assert tag == "sample/T=0.5 'The'/text_summary"
    assert found.Tensors(tag)[-1].tensor_proto.string_val == [b"The end"]


def test_a_tracker_that_fails_is_turned_off_and_the_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing:
        def log(self, *_: object, **__: object) -> None:
            raise OSError("no space left")

    monkeypatch.setattr(wandb, "init", lambda **_: Failing())
    run = RunLog(RunFolder(tmp_path), 0, "calm", TrainingConfig(wandb="online"), {})
    for step in (1, 2):
        run.write(step, "train", {"loss": 1.0})
    run.close()
    assert capsys.readouterr().err == "wandb is off (no space left); metrics.jsonl has everything.\n"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_tracker_that_cannot_start_is_turned_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    trackers = Trackers(tmp_path, 0, "calm", TENSORBOARD, {})
    trackers.log(1, "train", {"loss": 1.0})
    trackers.finish()
    assert "tensorboard is off" in capsys.readouterr().err
