"""Real process trees, killed."""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from launching import ROOT, finish, launch, running, torchrun

from calm_core import config
from calm_core.checkpoint.folder import damaged_files, list_checkpoints, open_checkpoint
from calm_core.config.experiment import Experiment
from calm_core.errors import ExitCode
from calm_core.training.launch import run_calm
from calm_core.training.run_log import read_metrics

SCRIPT = ROOT / "pretrain" / "train_calm.py"
FAULTY = ROOT / "tests" / "helpers" / "faulty_rank.py"


def arguments(folder: Path, steps: int) -> list[str]:
    settings = {"run": folder, "training.steps": steps, "training.save_every": 1, "training.log_every": 1}
    return [str(folder / "config.yaml"), *(f"{key}={value}" for key, value in settings.items())]


def wait_for(condition: Callable[[], bool], process: psutil.Popen, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "too late"
        time.sleep(0.0005)


def rank_of(process: psutil.Popen, rank: int) -> psutil.Process:
    """The process of this rank below torchrun."""
    children = psutil.Process(process.pid).children(recursive=True)
    return next(c for c in children if c.name().startswith("python") and c.environ().get("RANK") == str(rank))


def saved_steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder / "calm" / "checkpoints")]


def saving(folder: Path) -> bool:
    """Whether tensors of a later checkpoint are being written while an earlier one is complete."""
    if not saved_steps(folder):
        return False  # asked first: what is partial after this is a later checkpoint
    return any((folder / "calm" / "checkpoints").glob("step-*.partial/tensors/*"))


def assert_nothing_reported_is_lost(folder: Path) -> int:
    """The newest checkpoint is whole, and no older than the last that was reported saved; its step."""
    newest = open_checkpoint(list_checkpoints(folder / "calm" / "checkpoints")[-1])
    assert damaged_files(newest, slice(None)) == []
    events = read_metrics(folder / "calm" / "metrics.jsonl", "event")
    assert newest.step >= max((event["saved"] for event in events if event["event"] == "checkpoint"), default=0)
    return newest.step


def assert_it_goes_on(folder: Path, step: int, capsys: pytest.CaptureFixture[str]) -> None:
    path, *overrides = arguments(folder, step + 2)
    assert run_calm(config.load(Experiment, Path(path), overrides)) == ExitCode.OK
    assert f"resumed from {folder / 'calm' / 'checkpoints' / f'step-{step}'}" in capsys.readouterr().out
    records = read_metrics(folder / "calm" / "metrics.jsonl", "train")
    assert [record["step"] for record in records] == list(range(1, step + 3))
    assert not list((folder / "calm" / "checkpoints").glob("*.*"))


def test_killed_in_the_middle_of_a_save(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running([sys.executable, str(SCRIPT), *arguments(tiny, 10_000)]) as process:
        wait_for(lambda: saving(tiny), process)
        process.kill()
        process.wait()
    assert_it_goes_on(tiny, assert_nothing_reported_is_lost(tiny), capsys)


@pytest.mark.slow
def test_one_rank_killed_in_the_middle_of_a_save(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(torchrun(2, SCRIPT, *arguments(tiny, 10_000))) as process:
        wait_for(lambda: saving(tiny), process)
        rank_of(process, 1).kill()
        process.wait(timeout=100)
        assert process.returncode == ExitCode.FAILED
    assert_it_goes_on(tiny, assert_nothing_reported_is_lost(tiny), capsys)


@pytest.mark.slow
def test_one_rank_killed_between_steps(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After step 5 and with step 4 saved; the other rank waits in step 6 until it is ended."""
    every_fourth = "training.save_every=4", "training.background_saves=false"
    code, output = finish(torchrun(2, FAULTY, "die", *arguments(tiny, 10_000), *every_fourth), seconds=200)
    assert code == ExitCode.FAILED, output
    assert [record["step"] for record in read_metrics(tiny / "calm" / "metrics.jsonl", "train")] == [1, 2, 3, 4, 5]
    assert assert_nothing_reported_is_lost(tiny) == 4
    assert_it_goes_on(tiny, 4, capsys)


@pytest.mark.slow
def test_two_ranks_asked_to_stop_save_at_the_same_step(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGTERM has the same path; it stops a single process in tests/training/test_resume.py."""
    with running(torchrun(2, SCRIPT, *arguments(tiny, 10_000), "parallel.tensor=2")) as process:
        wait_for(lambda: bool(saved_steps(tiny)), process)
        rank_of(process, 1).send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=100)
    assert process.returncode == ExitCode.STOPPED, output
    assert_it_goes_on(tiny, assert_nothing_reported_is_lost(tiny), capsys)


@pytest.mark.slow
def test_two_ranks_of_which_one_hangs(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both write their stacks: where rank 1 hangs, and that rank 0 waits for it."""
    hang = torchrun(2, FAULTY, "hang", *arguments(tiny, 10_000), "training.hang_minutes=0.1")
    code, output = finish(hang, seconds=200)
    assert code == ExitCode.WATCHDOG, output
    stacks = [(tiny / "calm" / "logs" / f"stacks-rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "in wait_for_ever\n" in stacks[1]
    assert "in all_reduce\n" in stacks[0]
    assert_it_goes_on(tiny, assert_nothing_reported_is_lost(tiny), capsys)


@pytest.mark.slow
def test_a_spike_on_one_of_two_ranks_changes_nothing_on_either(tiny: Path) -> None:
    more = "training.keep=9", "training.spikes.action=skip", "training.spikes.window=8"
    launch(2, FAULTY, "spike", *arguments(tiny, 8), *more)
    events = read_metrics(tiny / "calm" / "metrics.jsonl", "event")
    assert [(event["step"], event["reason"]) for event in events if event["event"] == "refused"] == [(7, "spike")]
    contents = [open_checkpoint(path).checksums for path in list_checkpoints(tiny / "calm" / "checkpoints")[-3:]]
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.slow
def test_a_rank_that_does_not_see_the_checkpoints_resumes_with_the_others(tiny: Path) -> None:
    for steps, words in ((2, ""), (4, "resumed from "), (4, "finished: ")):
        assert words in launch(2, FAULTY, "stale", *arguments(tiny, steps), seconds=60)
    assert saved_steps(tiny)[-1] == 4
    records = read_metrics(tiny / "calm" / "metrics.jsonl", "train")
    assert [(record["step"], record["samples"]) for record in records] == [(n, 8 * n) for n in (1, 2, 3, 4)]


@pytest.mark.slow
def test_a_rank_that_stands_still_is_missed_by_the_others(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stopped process can write and end nothing: the other rank does, and torchrun kills the stopped one."""
    with running(torchrun(2, SCRIPT, *arguments(tiny, 10_000), "training.hang_minutes=0.1")) as process:
        wait_for(lambda: bool(saved_steps(tiny)), process)
        stopped = rank_of(process, 1)
        stopped.suspend()
        output, _ = process.communicate(timeout=200)
        assert not stopped.is_running()
    assert process.returncode == ExitCode.WATCHDOG, output
    assert [path.name for path in (tiny / "calm" / "logs").iterdir()] == ["stacks-rank-0.txt"]
    assert_it_goes_on(tiny, assert_nothing_reported_is_lost(tiny), capsys)


@pytest.mark.slow
def test_a_second_run_in_the_folder_of_a_running_one(tiny: Path) -> None:
    with running([sys.executable, str(SCRIPT), *arguments(tiny, 10_000)]) as process:
        wait_for(lambda: bool(saved_steps(tiny)), process)
        code, output = finish(torchrun(2, SCRIPT, *arguments(tiny, 10_000)), seconds=200)
        assert process.poll() is None
    assert code == ExitCode.USAGE
    assert "another run is training in" in output
    assert "Traceback" not in output
