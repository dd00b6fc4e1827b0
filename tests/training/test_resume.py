"""How a run begins and resumes: refusals, damage, initial weights of another run."""

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
from damage import cut, flip
from tiny_runs import curve, events, forward_step_of, steps_saved, tensors_of, train

from calm_core import config
from calm_core.config.experiment import Experiment
from calm_core.errors import ExitCode, UserError
from calm_core.training.launch import run_autoencoder
from calm_core.training.run_log import RunFolder


def test_a_run_is_finished_when_run_again(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [record[0] for record in curve(whole)] == [1, 2, 3, 4, 5, 6]
    assert [record[4] for record in curve(whole)] == [8, 16, 24, 32, 40, 48]
    assert train(whole) == ExitCode.OK
    assert "finished: " in capsys.readouterr().out
    assert config.load(Experiment, whole / "calm" / "config.yaml", []).training.steps == 6


def test_a_resume_is_bitwise_the_uninterrupted_run(
    whole: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped by SIGTERM within step 3, and told another interval of evaluation when started again."""

    def step(original: Any, task: Any, micro_batches: Any, model: Any) -> Any:
        if len(curve(tiny)) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(task, micro_batches, model)

    before = signal.getsignal(signal.SIGTERM)
    with forward_step_of(monkeypatch, step):
        assert train(tiny) == ExitCode.STOPPED
    assert signal.getsignal(signal.SIGTERM) is before
    assert steps_saved(tiny) == [3]
    assert train(tiny, "training.eval_every=2") == ExitCode.OK
    assert "resume: training.eval_every was 0, is now 2" in capsys.readouterr().out
    assert curve(tiny) == curve(whole)
    assert tensors_of(tiny, 6) == tensors_of(whole, 6)
    assert events(tiny) == [(0, "start"), (3, "stopped"), (3, "start"), (6, "finished")]
    page = (tiny / "report.html").read_text()
    assert "<td>stopped</td>" in page
    assert "<td>restart</td>" in page


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (flip, "tensors/rank-0.safetensors"),
        (cut, "tensors/rank-0.safetensors"),
        (flip, "manifest.json"),
        (cut, "tensors/index.json"),
    ],
)
def test_damage_is_named_and_the_checkpoint_before_is_used(
    whole: Path, tiny: Path, damage: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny, "training.steps=4", "training.save_every=2")
    path = tiny / "calm" / "checkpoints" / "step-4" / name
    damage(path)
    assert train(tiny, "training.save_every=1", "training.keep=1") == ExitCode.OK
    out = capsys.readouterr().out
    assert f"{path} is" in out
    assert "resumed from " in out
    assert curve(tiny) == curve(whole)
    assert tensors_of(tiny, 6) == tensors_of(whole, 6)


def test_a_damaged_checkpoint_is_not_kept_in_place_of_a_good_one(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny, "training.steps=4", "training.save_every=2")
    checkpoints = tiny / "calm" / "checkpoints"
    flip(checkpoints / "step-4" / "tensors" / "rank-0.safetensors")

    def step(original: Any, task: Any, micro_batches: Any, model: Any) -> Any:
        if (checkpoints / "step-3").exists():
            raise KeyboardInterrupt
        return original(task, micro_batches, model)

    with forward_step_of(monkeypatch, step), pytest.raises(KeyboardInterrupt):
        train(tiny, "training.save_every=1", "training.keep=1")
    assert steps_saved(tiny) == [3, 4]
    assert [name for _, name in events(tiny)] == ["start", "finished", "start", "failed"]
    assert "<td>failed</td><td>reason: KeyboardInterrupt" in (tiny / "report.html").read_text()


def test_no_checkpoint_left_whole_is_no_fresh_start(tiny: Path) -> None:
    train(tiny, "training.steps=2")
    flip(tiny / "calm" / "checkpoints" / "step-2" / "tensors" / "rank-0.safetensors")
    with pytest.raises(UserError, match="holds no undamaged checkpoint"):
        train(tiny)
    assert len(curve(tiny)) == 2


def test_a_full_disk_leaves_the_checkpoint_before(whole: Path, tiny: Path) -> None:
    train(tiny, "training.steps=2")
    largest = max(path.stat().st_size for path in (tiny / "calm" / "checkpoints").rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, limits[1]))
    try:
        with pytest.raises(UserError, match=r"step-4 could not be written .*earlier checkpoints are intact"):
            train(tiny, "training.save_every=4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tiny / "calm" / "checkpoints").iterdir()] == ["step-2"]
    train(tiny)
    assert tensors_of(tiny, 6) == tensors_of(whole, 6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("seed=1", "seed was 0 and is now 1"),
        ("model.hidden=64", r"model\.backbone\.hidden was 32 and is now 64"),
        ("training.positions=16", "positions was 32 and is now 16"),
        ("training.resume=never", "already holds a run"),
    ],
)
def test_another_run_is_refused(whole: Path, change: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        train(whole, change, "training.steps=8")
    assert steps_saved(whole) == [2, 4, 6]


def test_a_folder_of_something_else_is_refused(tiny: Path) -> None:
    (tiny / "calm").mkdir()
    (tiny / "calm" / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match="holds something other than a run"):
        train(tiny)
    assert [path.name for path in (tiny / "calm").iterdir()] == ["thesis.tex"]


def test_two_runs_in_one_folder(tiny: Path) -> None:
    with RunFolder(tiny / "calm").locked(), pytest.raises(UserError, match="another run is training in"):
        train(tiny)
    assert train(tiny, "training.steps=1") == ExitCode.OK


def test_a_layout_that_does_not_divide_the_world(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"parallel\.tensor=2 .* does not divide the 1 ranks"):
        train(tiny, "parallel.tensor=2")
    assert not (tiny / "calm").exists()


def test_init_from_takes_the_weights_alone(whole: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = whole / "calm" / "checkpoints" / "step-6"
    assert train(tiny, f"training.init_from={source}", "head.samples=6", "training.steps=1") == ExitCode.OK
    assert "starting from all weights" in capsys.readouterr().out
    first = curve(tiny)[0]
    assert first[0] == 1
    assert first[3] == curve(whole)[0][3]  # the schedule starts again
    assert first[1] < curve(whole)[0][1]
    assert train(tiny, f"training.init_from={source}", "head.samples=6", "training.steps=2") == ExitCode.OK
    assert "resumed from " in capsys.readouterr().out


def test_init_from_another_head_takes_the_backbone(whole: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = whole / "calm" / "checkpoints" / "step-6"
    assert train(tiny, f"training.init_from={source}", "head.blocks=1", "training.steps=1") == ExitCode.OK
    assert "starting from backbone.* alone of" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["model.layers=2", "model.norm_eps=1e-5", "model.hidden=64"])
def test_init_from_another_backbone_is_refused(whole: Path, tiny: Path, change: str) -> None:
    key = change.partition("=")[0].replace("model", "backbone")
    with pytest.raises(UserError, match=rf"init_from: {key} is .* in that checkpoint"):
        train(tiny, f"training.init_from={whole / 'calm' / 'checkpoints' / 'step-6'}", change)


def test_init_from_nothing(tiny: Path) -> None:
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        train(tiny, f"training.init_from={tiny}")


@pytest.mark.parametrize("outputs", [0, 200])
def test_the_autoencoder_resumes_and_freezes(tiny: Path, outputs: int, capsys: pytest.CaptureFixture[str]) -> None:
    def train_autoencoder(run: str, *overrides: str) -> ExitCode:
        stores = [f"run={tiny / run}", f"data.tokens={tiny / 'tokens'}", f"autoencoder.sampled_output={outputs}"]
        return run_autoencoder(config.load(Experiment, tiny / "config.yaml", [*stores, *overrides]))

    assert train_autoencoder("a") == ExitCode.OK
    assert train_autoencoder("b", "autoencoder_training.steps=4") == ExitCode.OK
    (tiny / "b" / "autoencoder" / "frozen" / "manifest.json").unlink()  # as if killed before it was complete
    assert train_autoencoder("b") == ExitCode.OK
    frozen = [(tiny / run / "autoencoder" / "frozen" / "manifest.json").read_bytes() for run in "ab"]
    assert frozen[0] == frozen[1]
    capsys.readouterr()
    assert train_autoencoder("b") == ExitCode.OK
    assert "finished: " in capsys.readouterr().out
    source = tiny / "a" / "autoencoder" / "checkpoints" / "step-6"
    with pytest.raises(UserError, match="init_from: latent is 8 in that checkpoint and 4 here"):
        train_autoencoder("c", f"autoencoder_training.init_from={source}", "autoencoder.latent=4")


def test_a_batch_changed_on_resume_needs_what_its_steps_consume(tiny: Path) -> None:
    from calm_core.training.calm_task import CalmTask

    required: list[int] = []
    original = CalmTask.require
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CalmTask, "require", lambda task, count: (required.append(count), original(task, count))[1])
        train(tiny, "training.steps=2")
        train(tiny, "training.steps=5", "training.global_batch=4")
    assert required == [16, 16, 16 + 3 * 4, 16 + 3 * 4]  # before anything is written, and once the model is loaded


WSD = ("training.schedule.kind=wsd", "training.schedule.decay=0.5", "training.schedule.warmup=0")


def test_a_decayed_run_that_is_extended_says_so_and_offers_the_milestone(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny, *WSD, "training.milestones=[3]", "training.keep=1")
    capsys.readouterr()
    checkpoints = tiny / "calm" / "checkpoints"
    train(tiny, *WSD, "training.steps=14", "training.milestones=[3]")
    out = capsys.readouterr().out
    assert "the learning rate rises from 0 to" in out
    assert "because wsd had begun its decay at step 3 of 6" in out
    assert f"give a new `run` folder and training.resume_from={checkpoints / 'step-3'}" in out
    stores = [f"data.{name}={tiny}/{name}" for name in ("chunks", "tokens")]
    stores += [f"data.autoencoder={tiny}/autoencoder/frozen", f"run={tiny}/longer"]
    train(tiny, *WSD, "training.steps=8", f"training.resume_from={checkpoints / 'step-3'}", *stores)
    rates = [record[3] for record in curve(tiny / "longer")]
    assert len(rates) == 5
    assert rates == sorted(rates, reverse=True)
    assert "rises" not in capsys.readouterr().out


def test_a_finished_run_says_what_it_ignores(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    train(whole, "training.optimizer.learning_rate=0.5")
    out = capsys.readouterr().out
    assert "finished: " in out
    assert "not applied, because no steps remain: training.optimizer.learning_rate was 0.01, is now 0.5" in out
    train(whole, "training.steps=4")
    assert f"finished: {whole / 'calm'} holds 6 steps, more than training.steps=4" in capsys.readouterr().out
