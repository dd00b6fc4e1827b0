"""The loop: requests to save and to stop, skipped updates, evaluations, which checkpoints are kept."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import curve, events, forward_step_of, steps_saved, tensors_of, train

from calm_core.errors import ExitCode, UserError
from calm_core.training.run_log import read_metrics


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
    with forward_step_of(monkeypatch, poison({3, 4, 5}, tiny)), pytest.raises(UserError, match=words) as stopped:
        train(tiny, "training.save_every=2", "training.bad_steps=2")
    assert stopped.value.on_all_ranks  # one of them prints it
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
