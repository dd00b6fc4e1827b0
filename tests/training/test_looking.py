"""What a run leaves to look at: texts over time, a profile, the page that shows both, the files of wandb."""

import gzip
import json
from pathlib import Path

import pytest

from calm_core import config
from calm_core.errors import ExitCode, UserError
from calm_core.experiment import Experiment
from calm_core.training.launch import run_calm
from calm_core.training.run_log import read_metrics


def experiment(run: Path, *changes: str) -> Experiment:
    return config.load(Experiment, run / "config.yaml", [f"run={run}", "training.steps=4", *changes])


def test_texts_and_profile_are_left_and_shown(tiny: Path) -> None:
    said = [
        "samples.while_training=true",
        "samples.prompts=[tone, '']",
        "samples.max_tokens=5",
        "training.eval_every=2",
    ]
    assert run_calm(experiment(tiny, *said, "training.eval_every=2", "profile.steps=[2,3]")) == ExitCode.OK
    records = read_metrics(tiny / "calm" / "metrics.jsonl", "sample")
    assert [(r["step"], r["temperature"], r["prompt"]) for r in records] == [
        (step, temperature, prompt) for step in (2, 4) for temperature in (1.0, 0.5) for prompt in ("tone", "")
    ]
    with gzip.open(tiny / "calm" / "profile" / "rank-0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("name", "").startswith("aten::") for event in events)
    assert "aten::" in (tiny / "calm" / "profile" / "rank-0.txt").read_text()
    page = (tiny / "report.html").read_text()
    assert 'href="calm/profile/rank-0.json.gz"' in page
    assert "<td>tone</td>" in page
    assert "<td>share of FLOPs</td>" in page or "<th>share of FLOPs</th>" in page


def test_a_profile_changes_no_number(tiny: Path) -> None:
    losses = []
    for run, changes in ((tiny, []), (Path(str(tiny) + "-profiled"), ["profile.steps=[1,2]"])):
        made = experiment(tiny, *changes)
        made = config.load(
            Experiment,
            tiny / "config.yaml",
            [
                f"run={run}",
                "training.steps=3",
                f"data.chunks={tiny / 'chunks'}",
                f"data.tokens={tiny / 'tokens'}",
                f"data.autoencoder={made.paths.autoencoder}",
                *changes,
            ],
        )
        assert run_calm(made) == ExitCode.OK
        losses.append([record["loss"] for record in read_metrics(run / "calm" / "metrics.jsonl", "train")])
    assert losses[0] == losses[1]


def test_a_resume_profiles_the_steps_that_are_left(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_calm(experiment(tiny, "training.steps=2")) == ExitCode.OK
    assert run_calm(experiment(tiny, "training.steps=3", "profile.steps=[1,2]")) == ExitCode.OK
    assert "profile.steps=[1, 2]: nothing is profiled, the run goes on after step 2" in capsys.readouterr().out
    assert not (tiny / "calm" / "profile").exists()
    assert run_calm(experiment(tiny, "training.steps=5", "profile.steps=[2,4]")) == ExitCode.OK
    assert "profile of steps 4 to 4: " in capsys.readouterr().out
    assert "aten::" in (tiny / "calm" / "profile" / "rank-0.txt").read_text()


def test_wandb_gets_the_same_names_and_one_id_over_a_resume(tiny: Path) -> None:
    settings = ["training.wandb=offline", "training.wandb_group=study", "training.eval_every=2"]
    assert run_calm(experiment(tiny, *settings, "training.steps=2")) == ExitCode.OK
    first = (tiny / "calm" / "wandb_id").read_text()
    assert run_calm(experiment(tiny, *settings)) == ExitCode.OK
    assert (tiny / "calm" / "wandb_id").read_text() == first
    runs = sorted((tiny / "calm" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2  # one a start, to be synced as one run
    assert all(run.name.endswith(first) for run in runs)
    written = b"".join(file.read_bytes() for run in runs for file in run.glob("*.wandb"))
    for name in (b"train/loss", b"train/gradient_norm", b"eval/brier_1", b"study"):
        assert name in written


def test_samples_need_a_whole_model(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"samples\.while_training=true needs ranks that hold the whole model"):
        experiment(tiny).samples.__class__(while_training=True).require_whole_model(2, 1)
