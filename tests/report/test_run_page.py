import json
import math
import re
import runpy
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from browser import check_that_it_draws, drawn, figures, opened, with_script
from launching import ROOT

from calm_core import config as configuration
from calm_core.cluster.status import StageRecords
from calm_core.config.experiment import Experiment
from calm_core.errors import UserError
from calm_core.plan import flops
from calm_core.plan.dry_run import model_shape
from calm_core.report.figure import Axis, Figure, Trace
from calm_core.report.page import Paragraph, Section, Table, render
from calm_core.report.run_page import write_comparison, write_run_page
from calm_core.training.run_log import read_metrics

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
                "spikes": step // 30,
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
    assert shown["one-calm-spikes"]["layout"]["title"]["text"] == "updates skipped as spikes so far"
    [training, held_out] = shown["one-calm-loss"]["data"]
    assert training["x"] == list(STEPS)
    assert training["y"] == [1 + 10 / step for step in STEPS]
    assert held_out["y"] == [1.5]
    assert held_out["error_y"]["array"] == pytest.approx([0.2])
    assert shown["one-calm-to_target"]["data"][0]["y"][2] is None
    assert "one-calm-brier_lm" not in shown  # never significant


def test_what_happened_and_what_was_set_is_on_it(run: Path) -> None:
    text = write_run_page(run).read_text()
    assert re.search(r"<td>30</td><td>restart after a crash</td><td>ranks: 1</td>", text)
    assert re.search(r"<tr class=marked><td>head\.samples</td><td>4</td><td>8</td></tr>", text)
    assert "<tr><td>training.steps</td><td>50</td>" in text


def explained(page: Path, name: str) -> list[str]:
    """The cells of the one row of the page's tables that begins with this explained term."""
    [row] = re.findall(rf"<tr><td><abbr[^>]*>{name}</abbr></td>(.*?)</tr>", page.read_text())
    return re.findall(r"<td>(.*?)</td>", row)


def test_the_full_evaluation_and_the_baseline_stand_at_its_head(run: Path) -> None:
    """The full evaluation is that of the last step; before that the head has the last one in training."""
    shutil.copytree(run / "calm", run / "ar" / "calm")
    assert explained(write_run_page(run), "Brier-1") == ["2.000% ± 0.800%"] * 2
    scored = {"step": STEPS[-1], "brier_1": 0.03, "brier_1_error": 0.001, "bigram_brier_1": 0.07}
    scored |= {"standard_errors": {"interval_factor": 2.5}}
    (run / "calm" / "evaluation.json").write_text(json.dumps(scored | {"step": STEPS[0]}))
    (run / "ar" / "calm" / "evaluation.json").write_text(json.dumps(scored | {"brier_1": 0.05}))
    assert explained(write_run_page(run), "Brier-1") == ["2.000% ± 0.800%", "5.000% ± 0.250%"]
    (run / "calm" / "evaluation.json").write_text(json.dumps(scored))
    page = write_run_page(run)
    assert explained(page, "Brier-1") == ["3.000% ± 0.250%", "5.000% ± 0.250%"]
    assert explained(page, "bigram Brier-1") == ["7.000%", "7.000%"]
    assert "AR of equal training FLOPs" in page.read_text()
    shutil.rmtree(run / "ar")
    assert explained(write_run_page(run), "Brier-1") == ["3.000% ± 0.250%"]


def note(run: Path, *records: dict[str, Any]) -> None:
    """Append records to the metrics of a run."""
    with open(run / "calm" / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def rows(page: Path, *cells: str) -> list[list[str]]:
    """The rows of the page's tables that hold one of these cells."""
    found = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", page.read_text())]
    return [row for row in found if set(cells) & set(row)]


def test_restarts_and_faults_are_told_in_order(run: Path) -> None:
    """Stopped and started again, hung, failed; each start says whether the one before has come to its end."""
    begin = datetime(2026, 1, 1, 12, tzinfo=UTC)
    told = [("stopped", 0), ("start", 1), ("start", 90), ("finished", 91), ("start", 92), ("failed", 93), ("start", 94)]
    for event, seconds in told:
        note(run, {"step": 40, "kind": "event", "time": begin.timestamp() + seconds, "event": event})
    (run / "calm" / "logs").mkdir()
    for rank, seconds in ((0, 71), (1, 70)):
        said = (begin + timedelta(seconds=seconds)).isoformat(timespec="seconds")
        title = f"{said} rank {rank}, process 7: nothing came after step 41 for 60 s"
        (run / "calm" / "logs" / f"stacks-rank-{rank}.txt").write_text(f"{title}\nThread 1:\n")
    page = write_run_page(run)
    names = ("stopped", "failed", "restart", "restart after a crash", "ended by the watchdog")
    assert [row[1:4] for row in rows(page, *names)] == [
        ["", "30", "restart after a crash"],
        ["2026-01-01 12:00:00", "40", "stopped"],
        ["2026-01-01 12:00:01", "40", "restart"],
        ["2026-01-01 12:01:10", "", "ended by the watchdog"],
        ["2026-01-01 12:01:30", "40", "restart after a crash"],
        ["2026-01-01 12:01:32", "40", "restart"],
        ["2026-01-01 12:01:33", "40", "failed"],
        ["2026-01-01 12:01:34", "40", "restart after a crash"],
    ]
    assert "<td>rank 1, process 7: nothing came after step 41 for 60 s</td>" in page.read_text()
    for rank in (0, 1):
        assert f'href="calm/logs/stacks-rank-{rank}.txt"' in page.read_text()


def test_what_the_jobs_noted_is_told_with_the_training_they_served(run: Path) -> None:
    shutil.copytree(run / "calm", run / "autoencoder")
    for stage in ("build_chunks", "train_autoencoder", "train_calm"):
        records = StageRecords.of(run, stage, None)
        records.folder.mkdir(parents=True)
        records.note("7", 0, "end", code=76, step=3)
    with open(run / "slurm" / "train_calm" / "journal.jsonl", "a") as file:
        file.write('{"time": 1.0, "job": "7", "ev')  # being written
    found = rows(write_run_page(run), "build_chunks: end", "train_autoencoder: end", "train_calm: end")
    assert [(name, *rest) for name, _, *rest in found] == [
        ("one/calm", "", "build_chunks: end", "job: 7, restart: 0, code: 76"),
        ("one/calm", "3", "train_calm: end", "job: 7, restart: 0, code: 76"),
        ("one/autoencoder", "3", "train_autoencoder: end", "job: 7, restart: 0, code: 76"),
    ]


def test_texts_of_the_finished_run_come_before_those_on_the_way(run: Path) -> None:
    said = {"temperature": 0.5, "prompt": "Once"}
    note(run, *({"step": step, "kind": "sample", **said, "text": f"at {step}"} for step in (10, 20)))
    (run / "samples.json").write_text(json.dumps([{**said, "text": "in the end", "draws": 3}]))
    assert rows(write_run_page(run), "Once") == [
        ["one/calm", "samples.json", "0.5", "Once", "in the end"],
        ["one/calm", "20", "0.5", "Once", "at 20"],
        ["one/calm", "10", "0.5", "Once", "at 10"],
    ]


def test_an_evaluation_that_diverged_is_left_out(run: Path) -> None:
    note(run, {"step": 40, "kind": "eval", "loss": math.nan, "loss_error": math.inf, "brier_1": math.nan})
    note(run, {"step": 50, "kind": "eval", "loss": 1.25, "loss_error": math.nan})
    [_, band, held_out] = figures(write_run_page(run))["one-calm-loss"]["data"]
    assert (held_out["x"], held_out["y"]) == ([30, 50], [1.5, 1.25])
    assert band["x"] == [30, 30]


def test_what_is_not_finite_leaves_a_gap_in_any_figure(tmp_path: Path) -> None:
    trace = Trace("line", [1.0, 2.0, 3.0], [math.inf, 1.0, math.nan])
    (tmp_path / "page.html").write_text(render("page", [Section("all", [Figure("f", "", Axis("x"), [trace])])]))
    assert figures(tmp_path / "page.html")["f"]["data"][0]["y"] == [None, 1.0, None]


def test_links_lead_from_each_page_to_the_files(run: Path, tmp_path: Path) -> None:
    same = _run(tmp_path / "another #2" / "one", 2.0)
    files = [folder / "calm" / "profile" / "rank-0.txt" for folder in (run, same)]
    for file in files:
        file.parent.mkdir()
        file.touch()
    comparison = tmp_path / "pages" / "comparison.html"
    comparison.parent.mkdir()
    write_comparison([run, same], comparison)
    for page, expected in (
        (write_run_page(run), files[:1]),
        (write_run_page(run / "calm"), files[:1]),
        (comparison, files),
    ):
        targets = re.findall(r'href="([^"]*rank-0\.txt)"', page.read_text())
        assert [(page.parent / unquote(target)).resolve() for target in targets] == expected


@pytest.mark.slow
def test_it_opens_in_a_browser_without_an_error(run: Path, tmp_path: Path) -> None:
    check_that_it_draws(write_run_page(run), tmp_path / "profile")


@pytest.mark.slow
@pytest.mark.parametrize(("script", "error"), [("nothing.is.called.so()", "ReferenceError"), ("if (", "SyntaxError")])
def test_a_page_with_a_broken_script_is_noticed(run: Path, tmp_path: Path, script: str, error: str) -> None:
    with pytest.raises(AssertionError, match=f"Uncaught {error}"):
        check_that_it_draws(with_script(write_run_page(run), script), tmp_path / "profile")


@pytest.mark.slow
def test_what_plotly_draws_are_the_numbers_of_the_metrics(run: Path, tmp_path: Path) -> None:
    lines = drawn(write_run_page(run), tmp_path / "profile")
    train = read_metrics(run / "calm" / "metrics.jsonl", "train")
    for key in ("loss", "to_target", "gradient_norm", "tokens_per_second", "mfu", "spikes"):
        name = "one/calm training" if key == "loss" else "one/calm"
        points = [(x, y) for x, y in lines[f"one-calm-{key}"][name] if y is not None]
        assert points == [(record["step"], record[key]) for record in train if record[key] is not None], key
    assert lines["one-calm-loss"]["one/calm held-out"] == [[30, 1.5]]
    assert lines["one-calm-brier-1"]["unigram"] == [[30, 0.01]]


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


def test_runs_of_one_name_are_told_apart_and_one_given_twice_is_one(run: Path, tmp_path: Path) -> None:
    other = _run(tmp_path / "elsewhere" / "one", 2.0)
    write_comparison([run, other, run / "calm"], tmp_path / "comparison.html")
    shown = figures(tmp_path / "comparison.html")["calm-loss"]["data"]
    names = [trace["name"] for trace in shown if trace.get("name", "").endswith("training")]
    assert names == [f"{tmp_path.name}/one/calm training", "elsewhere/one/calm training"]


def test_texts_cannot_break_the_page(tmp_path: Path) -> None:
    trace = Trace("</script><b>", [1, 2], [3, None])
    text = render(
        "a & b",
        [Section("<x>", [Figure("f", "</script>", Axis("x"), [trace]), Table(["<h>"], [["<c>"]]), Paragraph("<t>")])],
    )
    (tmp_path / "page.html").write_text(text)
    assert figures(tmp_path / "page.html")["f"]["data"][0]["name"] == "</script><b>"
    assert "&lt;c&gt;" in text
    assert "<x>" not in text


def test_no_run_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no training run"):
        write_run_page(tmp_path)


def test_the_page_is_small_enough_to_send(run: Path) -> None:
    assert write_run_page(run).stat().st_size <= 1_500_000


def test_the_page_of_one_run_goes_where_it_is_asked(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    asked = tmp_path / "elsewhere.html"
    runpy.run_path(str(ROOT / "pretrain" / "report.py"))["main"]([str(run), "--output", str(asked)])
    assert capsys.readouterr().out.strip() == str(asked)
    assert figures(asked)["one-calm-loss"]["data"]
    assert not (run / "report.html").exists()


def test_losses_of_different_kinds_are_not_drawn_on_one_axis(run: Path, tmp_path: Path) -> None:
    other = _run(tmp_path / "two", 2.0)
    settings = other / "calm" / "config.yaml"
    settings.write_text(settings.read_text().replace("kind: energy", "kind: softmax"))
    write_comparison([run, other], tmp_path / "comparison.html")
    shown = figures(tmp_path / "comparison.html")
    assert "calm-loss" not in shown
    names = [{trace["name"] for trace in shown[f"calm-loss-{n}"]["data"] if "name" in trace} for n in (0, 1)]
    assert names[0] == {"one/calm training", "one/calm held-out"}
    assert names[1] == {"two/calm training", "two/calm held-out"}
    assert "are of different kinds and cannot be compared" in (tmp_path / "comparison.html").read_text()


def test_a_run_has_one_colour_in_all_figures(run: Path, tmp_path: Path) -> None:
    write_comparison([run, _run(tmp_path / "two", 2.0)], tmp_path / "comparison.html")
    shown = figures(tmp_path / "comparison.html")
    for name in ("one", "two"):
        colors = {
            trace["line"]["color"]
            for figure in shown.values()
            for trace in figure["data"]
            if trace.get("name", "").startswith(name)
        }
        assert len(colors) == 1


def count_samples(run: Path) -> None:
    """Two samples a step, which the page turns into tokens and hours."""
    metrics = run / "calm" / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    for record in records:
        if record["kind"] == "train":
            record["samples"] = 2 * record["step"]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_steps_can_be_read_as_tokens_and_hours(run: Path) -> None:
    count_samples(run)
    settings = configuration.load(Experiment, run / "calm" / "config.yaml", [])
    per_step = 2 * settings.training.positions * settings.data.k
    figure = figures(write_run_page(run))["one-calm-loss"]
    for trace, other in zip(figure["data"], figure["other_x"], strict=True):
        assert other["tokens"] == pytest.approx([step * per_step for step in trace["x"]])
        assert other["hours of training"] == pytest.approx([x / 1234.5 / 3600 for x in other["tokens"]])


def test_a_single_evaluation_stands_on_the_axis_of_the_whole_run(run: Path) -> None:
    assert figures(write_run_page(run))["one-calm-brier-1"]["layout"]["xaxis"]["range"] == [0, 50]


def test_the_axis_of_a_single_share_ends_at_all(run: Path) -> None:
    note(run, {"step": 50, "kind": "eval", "collision_1": 1.0, "token_accuracy": 0.25})
    shown = figures(write_run_page(run))
    assert shown["one-calm-collision_1"]["layout"]["yaxis"]["range"] == [0, 1.05]
    assert shown["one-calm-token_accuracy"]["layout"]["yaxis"]["range"] == [0, 0.5]


# Moves the smoothing control and the x axis as a reader does, and writes what Plotly shows then.
SMOOTHED = """
addEventListener("load", () => {
  const change = (id, value) => {
    document.getElementById(id).value = value;
    document.getElementById(id).dispatchEvent(new Event("change"));
  };
  const shown = () => document.getElementById("one-calm-loss").data[0].y;
  const before = shown();
  change("smooth", 0.9);
  const smoothed = shown();
  change("smooth", 0);
  const pre = document.createElement("pre");
  pre.id = "smoothed";
  pre.textContent = JSON.stringify([before, smoothed, shown()]);
  document.body.append(pre);
});
"""


def test_smoothing_averages_the_curve_and_is_undone(run: Path, tmp_path: Path) -> None:
    count_samples(run)
    dom, console = opened(with_script(write_run_page(run), SMOOTHED), tmp_path / "profile")
    assert not console, console
    [found] = re.findall(r'<pre id="smoothed">(.*?)</pre>', dom)
    before, smoothed, after = json.loads(found)
    assert before == after == [1 + 10 / step for step in STEPS]
    total, count = 0.0, 0.0
    for value, shown in zip(before, smoothed, strict=True):  # an exponential mean without bias at its start
        total, count = 0.9 * total + value, 0.9 * count + 1
        assert shown == pytest.approx(total / count)


def test_a_band_is_as_wide_as_the_documents_allow(run: Path) -> None:
    metrics = run / "calm" / "metrics.jsonl"
    resting = '"standard_errors": {"clusters": 3, "of": "documents", "interval_factor": 4.0}, "brier_1_error"'
    metrics.write_text(metrics.read_text().replace('"brier_1_error"', resting))
    shown = figures(write_run_page(run))
    assert shown["one-calm-loss"]["data"][1]["error_y"]["array"] == pytest.approx([0.4])
    assert shown["one-calm-brier-1"]["data"][0]["error_y"]["array"] == pytest.approx([0.016])
    again = {"step": 40, "kind": "eval", "loss": 2.0, "loss_error": 0.1}  # as older runs recorded it
    note(run, again)
    [_, band, held_out] = figures(write_run_page(run))["one-calm-loss"]["data"]
    assert held_out["y"] == [1.5, 2.0]
    assert band["y"] == pytest.approx([1.9, 2.2, 1.8, 1.1])


def test_the_head_names_parameters_machine_and_commit(run: Path) -> None:
    settings = configuration.load(Experiment, run / "calm" / "config.yaml", [])
    counted = sum(flops.parameters(model_shape(settings)).values())
    page = write_run_page(run)
    assert rows(page, "parameters") == [["parameters", f"{counted:,}"]]
    assert rows(page, "machine") == [["machine", "1 rank"]]
    start = {"parameters": 1234, "hardware": "a GPU", "ranks": 2, "precision": "bf16", "commit": "abc-dirty"}
    note(run, {"step": 50, "kind": "event", "event": "start", **start})
    page = write_run_page(run)
    assert rows(page, "parameters")[0] == ["parameters", "1,234"]
    assert rows(page, "machine") == [["machine", "a GPU, 2 ranks, bf16"]]
    assert rows(page, "commit")[0] == ["commit", "abc-dirty"]
