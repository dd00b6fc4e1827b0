"""What a run reads, through the path of the real command: a blend of stores, latents encoded on the way."""

import gzip
import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import ROOT

from calm_core import config
from calm_core.config.experiment import Experiment
from calm_core.config.model_config import HEADS
from calm_core.errors import ExitCode, UserError
from calm_core.inference.load_model import load_for_inference
from calm_core.report.run_page import write_run_page
from calm_core.training import launch
from calm_core.training.launch import run_autoencoder, run_calm
from calm_core.training.run_log import read_metrics


def test_a_blend_trains_resumes_and_shows_its_documents(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second store is the first one again: each of its windows comes once more often."""

    def run(*changes: str, weight: float = 0.25, epochs: int = 0) -> ExitCode:
        store = f"chunks: {tiny}/chunks, tokens: {tiny}/tokens"
        blend = f"[{{{store}}}, {{{store}, weight: {weight}, epochs: {epochs}}}]"
        return run_of(config.load(Experiment, tiny / "config.yaml", [f"run={tiny}", f"data.blend={blend}", *changes]))

    run_of = run_autoencoder
    assert run("autoencoder_training.steps=1", f"run={tiny}/other") == ExitCode.OK
    run_of = run_calm
    assert run("training.steps=1") == ExitCode.OK
    with pytest.raises(UserError, match=r"data was .*0\.25.* and is now .*0\.5"):
        run(weight=0.5)
    assert run("training.steps=2") == ExitCode.OK
    assert [record["step"] for record in read_metrics(tiny / "calm" / "metrics.jsonl", "train")] == [1, 2]
    capsys.readouterr()
    inspect = runpy.run_path(str(ROOT / "pretrain" / "inspect_batch.py"))["inspect"]
    inspect([str(tiny / "calm"), "--step", "2"])
    assert capsys.readouterr().out.count(".txt") >= 8
    once = f"data.blend=[{{chunks: {tiny}/chunks, epochs: 1}}]"
    with pytest.raises(UserError, match=r"data\.blend give [\d,]+ samples"):
        run(once, "training.steps=9999", f"run={tiny}/new", f"data.autoencoder={tiny}/autoencoder/frozen")


def test_latents_that_are_encoded_on_the_way_are_those_of_the_store(tiny: Path) -> None:
    """Up to float16's rounding of the stored ones; and a run may continue with the other kind."""

    def run(run: str, *changes: str) -> list[float]:
        places = [f"data.{name}={tiny}/{name}" for name in ("tokens", "chunks")]
        made = [*places, f"data.autoencoder={tiny}/autoencoder/frozen", f"run={tiny}/{run}"]
        assert run_calm(config.load(Experiment, tiny / "config.yaml", [*made, *changes])) == ExitCode.OK
        return [record["loss"] for record in read_metrics(tiny / run / "calm" / "metrics.jsonl", "train")]

    stored = run("stored", "training.steps=2", "training.eval_every=2")
    begun = run("mixed", "training.steps=1")
    (tiny / "chunks").rename(tiny / "no chunks")
    encoded = run("encoded", "training.steps=2", "training.eval_every=2", "data.latents=encode")
    assert encoded == pytest.approx(stored, rel=1e-5)
    assert [*begun, *run("mixed", "training.steps=2", "data.latents=encode")[1:]] == pytest.approx(stored, rel=1e-5)
    scores = [read_metrics(tiny / run / "calm" / "metrics.jsonl", "eval")[0] for run in ("stored", "encoded")]
    for name in ("loss", "brier_1", "unigram_brier_1", "documents"):
        assert scores[0][name] == pytest.approx(scores[1][name], rel=1e-3)


@pytest.mark.parametrize("run_of", [run_calm, run_autoencoder])
def test_micro_batch_auto_is_the_largest_that_fits_the_memory(
    tiny: Path, run_of: Callable[[Experiment], ExitCode], monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = run_of is run_calm
    section, folder = ("training", "calm") if calm else ("autoencoder_training", "autoencoder")
    taken = {f"data.{name}": f"{tiny}/{name}" for name in ("tokens", "chunks")}
    taken["data.autoencoder"] = f"{tiny}/autoencoder/frozen"
    changes = [f"{key}={value}" for key, value in taken.items()]

    def micro_batch(run: str, free: int) -> int:
        monkeypatch.setattr(launch, "free_memory", lambda device: free)
        auto = [f"run={tiny}/{run}", f"{section}.steps=1", f"{section}.micro_batch=auto", *changes]
        assert run_of(config.load(Experiment, tiny / "config.yaml", auto)) == ExitCode.OK
        saved = config.load(Experiment, tiny / run / folder / "config.yaml", [])
        return getattr(saved, section).micro_batch

    whole = config.load(Experiment, tiny / "config.yaml", [])
    assert micro_batch("roomy", 8 << 30) == getattr(whole, section).global_batch
    with pytest.raises(UserError, match=rf"{section}\.micro_batch=auto: not even 1 fits"):
        micro_batch("tight", 1 << 20)


def test_runs_one_after_another_let_go_of_their_process_groups(tiny: Path) -> None:
    """Gloo's threads poll: those of groups that nobody frees slow the whole machine."""
    left = []
    for steps in (1, 2):
        assert run_calm(config.load(Experiment, tiny / "config.yaml", [f"run={tiny}", f"training.steps={steps}"])) == 0
        left.append(sum((task / "comm").read_text() == "gloo_tcp_loop\n" for task in Path("/proc/self/task").iterdir()))
    assert left[1] <= left[0] + 1  # DeepSpeed keeps one; a run makes about twenty


@pytest.mark.parametrize("kind", HEADS)
def test_a_run_of_two_steps_with_an_evaluation(tiny: Path, kind: str) -> None:
    changes = [f"run={tiny}", f"head.kind={kind}", "training.steps=2", "training.eval_every=2"]
    if kind == "softmax":
        (tiny / "chunks").rename(tiny / "no chunks")
        (tiny / "autoencoder").rename(tiny / "no autoencoder")
    experiment = config.load(Experiment, tiny / "config.yaml", changes)
    assert run_calm(experiment) == ExitCode.OK
    metrics = tiny / "calm" / "metrics.jsonl"
    assert [record["step"] for record in read_metrics(metrics, "train")] == [1, 2]
    (scored,) = read_metrics(metrics, "eval")
    assert [n for n in range(1, 5) if f"brier_{n}" in scored] == [1, 2, 3, 4]
    assert scored["rollout_chunks"] == (4 if kind == "softmax" else 1)
    assert -1 <= scored["brier_1"] <= 1
    assert scored["loss"] > 0
    assert scored["scored_positions"] > 0


def experiment(run: Path, *changes: str) -> Experiment:
    return config.load(Experiment, run / "config.yaml", [f"run={run}", "training.steps=4", *changes])


def test_texts_and_profile_are_left_and_shown(tiny: Path) -> None:
    said = [
        "samples.while_training=true",
        "samples.prompts=[tone, '']",
        "samples.max_tokens=5",
        "training.eval_every=2",
    ]
    assert run_calm(experiment(tiny, *said, "profile.steps=[2,3]"), write_run_page) == ExitCode.OK
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
    assert "profile.steps=[1, 2]: nothing is profiled, the run resumes after step 2" in capsys.readouterr().out
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
    # Syncing a folder replaces the run's history, so the newest holds that of the earlier ones too.
    lines = [sum(file.read_bytes().count(b"train/gradient_norm") for file in run.glob("*.wandb")) for run in runs]
    assert lines[1] >= lines[0] + 2


def test_a_run_of_relative_paths_is_read_from_another_folder(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny)
    (tiny / "tk").mkdir()
    (tiny / "tokenizer" / "tokenizer.model").rename(tiny / "tk" / "t.model")
    changes = ["run=.", "data.tokenizer=tk/t.model", "training.steps=1"]
    assert run_calm(config.load(Experiment, tiny / "config.yaml", changes)) == ExitCode.OK
    monkeypatch.chdir("/")
    assert load_for_inference(tiny, torch.device("cpu")).tokenizer.vocab_size == 300
    assert config.load(Experiment, tiny / "calm" / "config.yaml", []).run == str(tiny)
