"""Our torchrun: what signals do to it and to its ranks, and how their errors are told."""

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from launching import ROOT, finish, running, torchrun

from calm_core.errors import ExitCode

pytestmark = pytest.mark.slow

WAITING = ROOT / "tests" / "helpers" / "waiting_rank.py"
FAILING = ROOT / "tests" / "helpers" / "failing_rank.py"


def wait_for_ranks(folder: Path, process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks, once both work."""
    ready = [folder / f"ready-{rank}" for rank in (0, 1)]
    end = time.monotonic() + 100
    while not all(path.exists() and path.read_text() for path in ready):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.05)
    return [psutil.Process(int(path.read_text())) for path in ready]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_ends_it_lets_the_ranks_save(tmp_path: Path, number: signal.Signals) -> None:
    with running(torchrun(2, WAITING, tmp_path)) as process:
        wait_for_ranks(tmp_path, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == ExitCode.STOPPED, output
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    assert "Traceback" not in output


def test_ranks_of_a_killed_launcher_save_and_end(tmp_path: Path) -> None:
    with running(torchrun(2, WAITING, tmp_path)) as process:
        ranks = wait_for_ranks(tmp_path, process)
        process.kill()
        gone, alive = psutil.wait_procs(ranks, timeout=60)
        for rank in alive:
            rank.kill()
        assert len(gone) == 2
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    with running(torchrun(2, WAITING, tmp_path)) as process:
        ranks = wait_for_ranks(tmp_path, process)
        ranks[1].suspend()  # so that the ranks cannot agree to stop
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=10)
        assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    assert process.returncode == ExitCode.INTERRUPTED, output
    assert not list(tmp_path.glob("saved-*"))


def test_an_error_of_one_rank_before_there_is_a_group_is_printed() -> None:
    code, output = finish(torchrun(2, FAILING, "start"), seconds=100)
    assert code == ExitCode.USAGE, output
    assert output.count("this rank alone refuses: fix it.\n") == 1
    assert "Traceback" not in output


def test_a_rank_that_fails_while_others_wait_for_it_prints_its_trace_and_ends() -> None:
    began = time.monotonic()
    code, output = finish(torchrun(2, FAILING, "group"), seconds=100)
    assert code == ExitCode.FAILED, output
    assert "RuntimeError: this rank alone fails" in output
    assert time.monotonic() - began < 90


def test_restarted_ranks_find_each_other() -> None:
    command = torchrun(2, FAILING, "restart")
    command[command.index("--standalone")] = "--max-restarts=1"  # without --standalone, as on several nodes
    command[4:4] = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    code, output = finish(command, seconds=250)
    assert code == ExitCode.OK, output
    assert "sum 2" in output
