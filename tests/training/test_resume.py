"""Runs of the tiny model through the real command's path: resume, refusal, faults. One process each."""

import os
import resource
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import cut, flip

from calm_core import config
from calm_core.checkpoint.folder import list_checkpoints, open_checkpoint
from calm_core.config.experiment import Experiment
from calm_core.errors import ExitCode, UserError
from calm_core.report.run_page import write_run_page
from calm_core.training.launch import run_autoencoder, run_calm
from calm_core.training.run_log import RunFolder, read_metrics

warnings.filterwarnings("ignore", category=DeprecationWarning)


def train(folder: Path, *overrides: str) -> ExitCode:
    return run_calm(config.load(Experiment, folder / "config.yaml", [f"run={folder}", *overrides]), write_run_page)


def steps_saved(folder: Path) -> list[int]:
    return [open_checkpoint(path).step for path in list_checkpoints(folder / "calm" / "checkpoints")]


def tensors_of(folder: Path, step: int) -> dict[str, str]:
    """Checksums of the files that hold the tensors of a checkpoint."""
    return open_checkpoint(folder / "calm" / "checkpoints" / f"step-{step}").checksums


def curve(folder: Path) -> list[tuple[int, float, float, float, int]]:
    names = ("step", "loss", "gradient_norm", "learning_rate", "samples")
    return [tuple(record[n] for n in names) for record in read_metrics(folder / "calm" / "metrics.jsonl", "train")]


def events(folder: Path) -> list[tuple[int, str]]:
    """The events of a run and their steps, without its checkpoints."""
    found = read_metrics(folder / "calm" / "metrics.jsonl", "event")
    return [(event["step"], event["event"]) for event in found if event["event"] != "checkpoint"]


@contextmanager
def forward_step_of(monkeypatch: pytest.MonkeyPatch, step: Any) -> Iterator[None]:
    """Within the block, runs use `step(original, task, micro_batches, model)` for CALM's forward step."""
    import calm_core.training.calm_task as module

    original = module.CalmTask.forward_step
    with monkeypatch.context() as patch:
        patch.setattr(module.CalmTask, "forward_step", lambda task, *given: step(original, task, *given))
        yield


@pytest.fixture(scope="module")
def whole(tiny_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps that nothing disturbed."""
    import shutil

    folder = Path(shutil.copytree(tiny_experiment, tmp_path_factory.mktemp("whole") / "tiny"))
    assert train(folder, "training.save_every=2", "training.keep=9") == ExitCode.OK
    return folder


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


def test_files_in_the_folder_ask_for_a_checkpoint_and_for_the_end(
    whole: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(original: Any, task: Any, micro_batches: Any, model: Any) -> Any:
        if name := {1: "save", 3: "stop"}.get(len(curve(tiny))):
            (tiny / "calm" / name).touch()
        return original(task, micro_batches, model)

    with forward_step_of(monkeypatch, step):
        assert train(tiny, "training.keep=9") == ExitCode.STOPPED
    assert steps_saved(tiny) == [2, 4]
    assert events(tiny)[-1] == (4, "stopped")
    assert not (tiny / "calm" / "save").exists()
    assert not (tiny / "calm" / "stop").exists()
    assert train(tiny) == ExitCode.OK
    assert curve(tiny) == curve(whole)


def test_a_watchdog_that_would_come_too_late_is_refused(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"training\.hang_minutes=3 is not below parallel\.timeout_minutes=2"):
        train(tiny, "parallel.timeout_minutes=2", "training.hang_minutes=3")
    assert not (tiny / "calm").exists()


def test_the_last_n_are_kept(tiny: Path) -> None:
    train(tiny, "training.save_every=1", "training.keep=3")
    assert steps_saved(tiny) == [4, 5, 6]


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


def poison(steps: set[int], folder: Path) -> Any:
    """A forward step whose loss is not a number in these steps."""

    def step(original: Any, task: Any, micro_batches: Any, model: Any) -> Any:
        output, loss_of = original(task, micro_batches, model)
        bad = len(curve(folder)) + 1 in steps

        def loss(output: Any) -> Any:
            value, metrics = loss_of(output)
            return (value * torch.nan, metrics | {"loss": value.detach() * torch.nan}) if bad else (value, metrics)

        return output, loss

    return step


def test_a_loss_that_is_no_number_changes_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with forward_step_of(monkeypatch, poison({2, 3, 5}, tiny)):
        train(tiny, "training.save_every=1", "training.keep=9", "training.bad_steps=3")
    records = read_metrics(tiny / "calm" / "metrics.jsonl", "train")
    assert [record["loss"] is None for record in records] == [False, True, True, False, True, False]
    assert [record["skipped_updates"] for record in records] == [0, 1, 2, 2, 3, 3]
    refused = [e for e in read_metrics(tiny / "calm" / "metrics.jsonl", "event") if e["event"] == "refused"]
    assert [(event["step"], event["reason"]) for event in refused] == [
        (2, "not_finite"),
        (3, "not_finite"),
        (5, "not_finite"),
    ]
    assert tensors_of(tiny, 1) == tensors_of(tiny, 2) == tensors_of(tiny, 3)
    assert tensors_of(tiny, 4) == tensors_of(tiny, 5)
    assert len({tuple(tensors_of(tiny, step).items()) for step in (1, 4, 6)}) == 3


def test_too_many_of_them_stop_the_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = r"stopped at step 4: .* not finite for 2 steps running .*training\.bad_steps"
    with forward_step_of(monkeypatch, poison({3, 4, 5}, tiny)), pytest.raises(UserError, match=words):
        train(tiny, "training.save_every=2", "training.bad_steps=2")
    assert steps_saved(tiny) == [2]


def scale_loss(factors: dict[int, float], folder: Path) -> Any:
    """A forward step whose loss, and gradient, is so many times itself in these steps."""

    def step(original: Any, task: Any, micro_batches: Any, model: Any) -> Any:
        output, loss_of = original(task, micro_batches, model)
        factor = factors.get(len(curve(folder)) + 1, 1.0)

        def loss(output: Any) -> Any:
            value, metrics = loss_of(output)
            return value * factor, metrics | {"loss": value.detach() * factor}

        return output, loss

    return step


SPIKES = ("training.steps=12", "training.spikes.window=8", "training.save_every=1", "training.keep=99")


def test_a_spike_is_left_out_and_its_documents_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped and resumed between two spikes, the run is the one that was not; the spikes leave no trace in it."""
    import shutil

    resumed = Path(shutil.copytree(tiny, tiny.with_name("resumed")))
    for folder, lengths in ((tiny, (12,)), (resumed, (8, 12))):
        with forward_step_of(monkeypatch, scale_loss({7: 50.0, 10: 50.0}, folder)):
            for steps in lengths:
                train(folder, *SPIKES, "training.spikes.action=skip", f"training.steps={steps}")
    records = read_metrics(tiny / "calm" / "metrics.jsonl", "train")
    assert [record["spikes"] for record in records] == [0] * 6 + [1] * 3 + [2] * 3
    assert tensors_of(tiny, 6) == tensors_of(tiny, 7)
    assert tensors_of(tiny, 9) == tensors_of(tiny, 10)
    assert tensors_of(tiny, 7) != tensors_of(tiny, 8)
    assert curve(resumed) == curve(tiny)
    assert tensors_of(resumed, 12) == tensors_of(tiny, 12)
    refused = [e for e in read_metrics(tiny / "calm" / "metrics.jsonl", "event") if e["event"] == "refused"]
    assert [(event["step"], event["reason"]) for event in refused] == [(7, "spike"), (10, "spike")]
    assert all(0 < len(event["documents"]) == len(set(event["documents"])) for event in refused)
    assert refused[0]["documents"] != refused[1]["documents"]


@pytest.mark.parametrize(("action", "more", "step"), [("stop", (), 7), ("skip", ("training.spikes.in_a_row=3",), 9)])
def test_spikes_end_the_run_when_configured(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, action: str, more: tuple[str, ...], step: int
) -> None:
    words = rf"stopped at step {step}: the loss or its gradient was a spike .*\(training\.spikes\)"
    with (
        forward_step_of(monkeypatch, scale_loss(dict.fromkeys(range(7, 13), 50.0), tiny)),
        pytest.raises(UserError, match=words),
    ):
        train(tiny, *SPIKES, *more, f"training.spikes.action={action}", "training.save_every=0")


def test_init_from_takes_the_weights_alone(whole: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = whole / "calm" / "checkpoints" / "step-6"
    assert train(tiny, f"training.init_from={source}", "head.samples=6", "training.steps=1") == ExitCode.OK
    assert "starting from all weights" in capsys.readouterr().out
    first = curve(tiny)[0]
    assert first[0] == 1
    assert first[3] == curve(whole)[0][3]  # the schedule starts anew
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


def test_an_evaluation_that_fails_costs_no_checkpoint_and_is_repeated(
    whole: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calm_core.training.calm_task import CalmTask

    def fail(*_: object) -> None:
        raise RuntimeError("the evaluation failed")

    with monkeypatch.context() as patch:
        patch.setattr(CalmTask, "evaluate", fail)
        with pytest.raises(RuntimeError, match="the evaluation failed"):
            train(tiny, "training.save_every=2", "training.eval_every=4", "training.keep=9")
    assert steps_saved(tiny) == [2, 4]
    with monkeypatch.context() as patch:
        patch.setattr(CalmTask, "evaluate", lambda task, engine, stop: {"loss": 1.0} if engine else None)
        train(tiny, "training.save_every=2", "training.eval_every=4", "training.keep=9")
    assert [record["step"] for record in read_metrics(tiny / "calm" / "metrics.jsonl", "eval")] == [4, 6]
    assert curve(tiny) == curve(whole)


@pytest.mark.parametrize(("every", "step"), [(2, 2), (0, 6)])
def test_a_signal_within_an_evaluation_ends_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, every: int, step: int
) -> None:
    from calm_core.evaluation import evaluate

    original = evaluate._score

    def score(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "_score", score)
        assert train(tiny, f"training.eval_every={every}") == ExitCode.STOPPED
    assert read_metrics(tiny / "calm" / "metrics.jsonl", "eval") == []
    assert steps_saved(tiny) == [step]
    assert train(tiny, f"training.eval_every={every}") == ExitCode.OK
    found = [record["step"] for record in read_metrics(tiny / "calm" / "metrics.jsonl", "eval")]
    assert found == ([2, 4, 6] if every else [6])


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_closed_terminal_and_ctrl_c_save(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    sent: list[int] = []

    def step(original: Any, task: Any, micro_batches: Any, model: Any) -> Any:
        if len(curve(tiny)) == 2 and not sent:  # once: a second Ctrl-C would end this process
            sent.append(number)
            os.kill(os.getpid(), number)
            assert number != signal.SIGINT or signal.getsignal(number) == signal.SIG_DFL
        return original(task, micro_batches, model)

    before = signal.getsignal(number)
    with forward_step_of(monkeypatch, step):
        assert train(tiny) == ExitCode.STOPPED
    assert signal.getsignal(number) is before
    assert steps_saved(tiny) == [3]
    printed = capfd.readouterr()
    assert "stopped on request after step 3: a checkpoint is saved" in printed.out
    assert ("Ctrl-C again ends at once" in printed.err) == (number == signal.SIGINT)


def test_milestones_are_kept(tiny: Path) -> None:
    train(tiny, "training.save_every=1", "training.keep=2", "training.milestones=[2]")
    assert steps_saved(tiny) == [2, 5, 6]


def test_a_batch_changed_on_resume_needs_what_its_steps_consume(tiny: Path) -> None:
    from calm_core.training.calm_task import CalmTask

    required: list[int] = []
    original = CalmTask.require
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CalmTask, "require", lambda task, count: (required.append(count), original(task, count))[1])
        train(tiny, "training.steps=2")
        train(tiny, "training.steps=5", "training.global_batch=4")
    assert required == [16, 16, 16 + 3 * 4]


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
