import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from launching import ROOT, run_script

from calm_core import config
from calm_core.config.scaling_config import CORRELATION_CONFIG, CorrelationConfig
from calm_core.errors import UserError
from calm_core.scaling.correlation import (
    correlations,
    experiment,
    later_half,
    points,
    report,
)


@pytest.fixture
def shipped(tmp_path: Path) -> CorrelationConfig:
    return config.load(CorrelationConfig, CORRELATION_CONFIG, [f"run={tmp_path / 'run'}"])


def test_models_differ_in_width_alone(shipped: CorrelationConfig) -> None:
    small, large = (experiment(shipped, width) for width in (32, 64))
    assert (small.model.hidden, small.model.ffn) == (32, 88)
    assert replace(small, run="", model=large.model) == replace(large, run="")
    assert small.head.kind == "softmax"
    assert shipped.steps[0] == 30
    assert [*small.training.milestones, small.training.steps] == shipped.steps
    ratios = [after / before for before, after in zip(shipped.steps, shipped.steps[1:], strict=False)]
    assert max(ratios) / min(ratios) < 1.1
    with pytest.raises(UserError, match=r"model\.heads=4 does not divide model\.hidden=33"):
        experiment(shipped, 33)


def record(step: int, loss: float, lm: float | None) -> str:
    scores = {f"brier_{n}": 0.5 / n - loss / 100 for n in range(1, 5)}
    errors = {f"{name}_error": 0.01 for name in scores} | {"brier_lm_error": None if lm is None else 0.1}
    values = {"loss": loss, "brier_lm": lm, "brier_lm_reason": None if lm else "too noisy", "measure": "m", **scores}
    return json.dumps({"step": step, "kind": "eval", **values, **errors}) + "\n"


def test_the_report_leaves_out_what_is_not_significant(shipped: CorrelationConfig) -> None:
    for width, lines in {
        32: [record(30, 6, None), record(60, 5, 1.0)],
        64: [record(30, 4, 2.5), record(60, 3, 3.0)],
    }.items():
        folder = experiment(shipped, width).paths.calm_run
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(lines))
    shown = report(shipped)
    found = json.loads((Path(shipped.run) / "correlation.json").read_text())
    # Of (5, 1.0), (4, 2.5), (3, 3.0) by hand: -2 / sqrt(2 * 13 / 6).
    assert found["correlations"]["brier_lm"]["pearson"] == pytest.approx(-2 / (2 * 13 / 6) ** 0.5)
    assert found["correlations"]["brier_lm"]["spearman"] == pytest.approx(-1)
    assert [found["correlations"][name]["points"] for name in ("brier_lm", "brier_1")] == [3, 4]
    assert found["correlations"]["brier_1"]["pearson"] == pytest.approx(-1)
    assert found["correlations"]["brier_lm, later half"]["points"] == 2
    assert found["evaluations"] == len(points(shipped)) == 4
    assert "1 evaluations have no BrierLM" in shown
    assert "-0.961" in shown
    assert (Path(shipped.run) / "correlation.png").stat().st_size > 1000


def test_the_later_half_is_of_each_model() -> None:
    points = [{"width": w, "step": step, "brier_lm": 1.0, "cross_entropy": 1.0} for step in (9, 1, 4) for w in (8, 16)]
    assert [(p["width"], p["step"]) for p in later_half(points)] == [(8, 4), (8, 9), (16, 4), (16, 9)]


def test_what_falls_exponentially_is_a_line_in_the_logarithm() -> None:
    found = correlations([{"x": math.exp(-2 * h), "cross_entropy": h} for h in (2.0, 5.0, 3.0, 4.0)], "x")
    assert found["pearson_of_log"] == pytest.approx(-1)
    assert found["spearman"] == pytest.approx(-1)
    assert -0.9 < found["pearson"] < -0.7


def test_too_few_equal_or_negative_points_have_no_correlation() -> None:
    none = {"pearson": None, "pearson_of_log": None, "spearman": None}
    assert correlations([{"x": 1.0, "cross_entropy": 2.0}] * 2, "x") == none | {"points": 2}
    assert correlations([{"x": None, "cross_entropy": 2.0}] * 2, "x") == none | {"points": 0}
    assert correlations([{"x": 1.0, "cross_entropy": float(i)} for i in range(3)], "x") == none | {"points": 3}
    found = correlations([{"x": -float(i), "cross_entropy": float(i)} for i in range(3)], "x")
    assert found["pearson_of_log"] is None
    assert found["pearson"] == pytest.approx(-1)


@pytest.mark.slow  # two trainings
def test_the_command_trains_reports_and_knows_when_it_is_done(tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog and runs away from a hungry bear near the river "
    words = text.split()
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        (tmp_path / "corpus" / f"{number}.txt").write_text(" ".join(words[number % 7 :] * (20 + number)))
    arguments = [
        f"run={tmp_path / 'run'}",
        "widths=[16, 32]",
        f"base.data.corpus=[{tmp_path}/corpus/*.txt]",
        "base.data.held_out=0.2",
        "base.tokenizer.vocab_size=290",
    ]
    arguments += ["base.training.steps=8", "first=2", "evaluations=3", "base.evaluation.windows=16"]
    for _ in range(2):
        code, output = run_script(ROOT / "pretrain" / "brier_correlation.py", *arguments)
        assert code == 0, output
        assert "Pearson r" in output
    assert "finished before" in output
    found = json.loads((tmp_path / "run" / "correlation.json").read_text())
    assert [(point["width"], point["step"]) for point in found["points"]] == [
        (w, s) for w in (16, 32) for s in (2, 4, 8)
    ]
