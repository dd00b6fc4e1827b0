"""The watchdog in a process of its own: what it writes, and how the process ends."""

import sys
import time
from pathlib import Path

import pytest
from launching import finish

from calm_core.config.training_config import TrainingConfig
from calm_core.errors import ExitCode, UserError
from calm_core.training.stopping import hangs

PROGRAM = """
import ctypes, sys, time
from pathlib import Path
from calm_core.training.stopping import Watchdog

def rest(seconds):
    time.sleep(seconds)

def rest_alone(seconds):  # a library call that keeps Python's lock: no other thread runs meanwhile
    ctypes.PyDLL(None).sleep(seconds)

with Watchdog({first}, {later}, 3, Path(sys.argv[1]) / "logs") as watchdog:
    {body}
print("came to its end")
"""


def run(folder: Path, first: float, later: float, body: str) -> tuple[int, str]:
    """The exit code and output of `body` under a watchdog of so many minutes."""
    program = PROGRAM.format(first=first, later=later, body=body)
    return finish([sys.executable, "-c", program, str(folder)], seconds=60)


def test_what_hangs_is_ended_with_its_stacks(tmp_path: Path) -> None:
    code, output = run(tmp_path, 10, 0.01, 'watchdog.alive("step 7"); rest(1000)')
    assert code == ExitCode.WATCHDOG == 76
    stacks = (tmp_path / "logs" / "stacks-rank-3.txt").read_text()
    for text in (stacks, output):
        assert "rank 3" in text
        assert "nothing came after step 7 for 0.6 s" in text
        assert "in rest\n" in text
    [(when, said)] = hangs(tmp_path / "logs")
    assert abs(when - time.time()) < 60
    assert said.startswith("rank 3, process ")


def test_ranks_that_hang_together_are_one_hang(tmp_path: Path) -> None:
    for rank, times in ((0, ("12:00:03", "12:30:00")), (1, ("12:00:01", "12:30:00"))):
        titles = [f"2026-01-01T{at}+00:00 rank {rank}, process 7: nothing came after the start for 6 s" for at in times]
        (tmp_path / f"stacks-rank-{rank}.txt").write_text("\nThread 1:\n".join(titles))
    found = hangs(tmp_path)
    assert [said.partition(",")[0] for _, said in found] == ["rank 1", "rank 0"]
    assert found[1][0] - found[0][0] == 30 * 60 - 1


def test_a_call_that_lets_no_thread_run_is_ended_too(tmp_path: Path) -> None:
    code, output = run(tmp_path, 0.02, 0.02, "rest_alone(1000)")
    assert code == ExitCode.FAILED
    assert "in rest_alone\n" in output


def test_a_long_start_and_a_long_sum_of_steps_are_no_hang(tmp_path: Path) -> None:
    body = 'rest(1.5); [(watchdog.alive("a step"), rest(0.4)) for _ in range(5)]'
    code, output = run(tmp_path, 1, 0.02, body)
    assert (code, output) == (0, "came to its end\n")
    assert not list(tmp_path.iterdir())


def test_none_is_started_where_none_is_wanted(tmp_path: Path) -> None:
    assert run(tmp_path, 0.001, 0, "rest(1)") == (0, "came to its end\n")


def test_a_start_is_not_shorter_than_a_step() -> None:
    with pytest.raises(UserError, match=r"training\.hang_start_minutes=5.* is below training\.hang_minutes=10"):
        TrainingConfig(hang_start_minutes=5.0)
