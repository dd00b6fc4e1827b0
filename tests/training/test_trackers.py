import sys
from pathlib import Path

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from calm_core.config.training_config import TrainingConfig
from calm_core.training.run_log import RunFolder, RunLog, read_metrics
from calm_core.training.trackers import Trackers

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


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
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


def test_a_tracker_that_cannot_start_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    trackers = Trackers(tmp_path, 0, "calm", TENSORBOARD, {})
    trackers.log(1, "train", {"loss": 1.0})
    trackers.finish()
    assert "tensorboard is off" in capsys.readouterr().err
