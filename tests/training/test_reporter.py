"""What a run prints and records."""

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import curve, train

from calm_core.training.run_log import read_metrics


def test_a_line_has_the_means_since_the_last_one(whole: Path, tiny: Path) -> None:
    train(tiny, "training.log_every=4")
    single, (first, second) = curve(whole), curve(tiny)
    for name in (1, 2):
        assert first[name] == pytest.approx(sum(line[name] for line in single[:4]) / 4)
        assert second[name] == pytest.approx(sum(line[name] for line in single[4:]) / 2)
    assert (first[3], first[4]) == (single[3][3], single[3][4])


def test_a_peak_that_training_exceeds_is_unknown(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("calm_core.training.reporter.peak_flops", lambda device, dtype: (1.0, "measured"))
    train(tiny, "training.steps=2")
    assert [r["mfu"] for r in read_metrics(tiny / "calm" / "metrics.jsonl", "train")] == [None, None]
    printed = capsys.readouterr()
    assert "mfu unknown" in printed.out
    assert printed.err.count("mfu: unknown, since training exceeds the peak") == 1


def test_the_start_line_names_model_tokens_device_and_layout(whole: Path, tiny: Path, capsys: Any) -> None:
    train(tiny, "training.steps=1")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("calm: "))
    assert "K=4, energy head, 4 layers of 32" in line
    assert "1 steps of 1.024k tokens = 1.024k; CPU, float32; 1 ranks = tensor 1 x pipeline 1 x data 1" in line
    assert "parameters" in line
