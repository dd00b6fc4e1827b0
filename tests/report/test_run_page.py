import json
import re
from pathlib import Path

import pytest
from browser import check_that_it_draws, figures

from calm_core import config as configuration
from calm_core.errors import UserError
from calm_core.experiment import Experiment
from calm_core.report.page import Figure, Section, Table, Text, Trace, render
from calm_core.report.run import write_comparison, write_run_page

STEPS = range(10, 60, 10)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run as training leaves it, with a restart, a refused update and a term of the loss that has gaps."""
    return _run(tmp_path / "one", 1.0)


def _run(folder: Path, level: float) -> Path:
    calm = folder / "calm"
    calm.mkdir(parents=True)
    base = folder / "base.yaml"
    base.write_text("training: {steps: 50}\n")
    loaded = configuration.load(Experiment, base, [f"run={folder}", f"config_file={base}", "head.samples=4"])
    configuration.save(loaded, calm / "config.yaml")
    records = [{"step": 0, "kind": "event", "event": "start", "ranks": 2, "stages": [{"stage": 0, "share": 1.0}]}]
    for step in STEPS:
        loss = level + 10 / step
        records.append(
            {
                "step": step,
                "kind": "train",
                "loss": loss,
                "to_target": None if step == 30 else loss / 3,
                "gradient_norm": 0.5,
                "tokens_per_second": 1234.5,
                "mfu": 0.4,
            }
        )
    records.append(
        {
            "step": 30,
            "kind": "eval",
            "loss": 1.5,
            "loss_error": 0.1,
            "brier_1": 0.02,
            "brier_1_error": 0.004,
            "unigram_brier_1": 0.01,
            "brier_lm": None,
            "brier_lm_reason": "</script> not significant",
        }
    )
    records.append({"step": 30, "kind": "event", "event": "start", "ranks": 1})
    (calm / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_the_numbers_on_the_page_are_those_of_the_metrics(run: Path) -> None:
    shown = figures(write_run_page(run))
    [training, band, held_out] = shown["one-calm-loss"]["data"]
    assert training["x"] == list(STEPS)
    assert training["y"] == [1 + 10 / step for step in STEPS]
    assert held_out["y"] == [1.5]
    assert band["y"] == pytest.approx([1.7, 1.3])
    assert shown["one-calm-to_target"]["data"][0]["y"][2] is None
    assert "one-calm-brier_lm" not in shown  # never significant


def test_what_happened_and_what_was_set_is_on_it(run: Path) -> None:
    text = write_run_page(run).read_text()
    assert re.search(r"<td>30</td><td>restart</td><td>ranks: 1</td>", text)
    assert re.search(r"<tr class=marked><td>head\.samples</td><td>4</td><td>8</td></tr>", text)
    assert "<tr><td>training.steps</td><td>50</td>" in text


@pytest.mark.slow
def test_it_opens_in_a_browser_without_an_error(run: Path, tmp_path: Path) -> None:
    check_that_it_draws(write_run_page(run), tmp_path / "profile")


def test_two_runs_are_drawn_together(run: Path, tmp_path: Path) -> None:
    other = _run(tmp_path / "two", 2.0)
    write_comparison([run, other], tmp_path / "comparison.html")
    lines = {
        trace["name"]: trace["y"][0]
        for trace in figures(tmp_path / "comparison.html")["calm-loss"]["data"]
        if "name" in trace
    }
    assert lines["one/calm training"] == 2.0
    assert lines["two/calm training"] == 3.0


def test_texts_cannot_break_the_page(tmp_path: Path) -> None:
    trace = Trace("</script><b>", [1, 2], [3, None])
    text = render(
        "a & b", [Section("<x>", [Figure("f", "</script>", "x", [trace]), Table(["<h>"], [["<c>"]]), Text("<t>")])]
    )
    (tmp_path / "page.html").write_text(text)
    assert figures(tmp_path / "page.html")["f"]["data"][0]["name"] == "</script><b>"
    assert "&lt;c&gt;" in text
    assert "<x>" not in text


def test_no_run_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no training run"):
        write_run_page(tmp_path)
