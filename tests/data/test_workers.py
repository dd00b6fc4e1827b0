import os
import signal
import subprocess
import sys

import psutil
import pytest

from calm_core.data.workers import spread
from calm_core.errors import UserError


@pytest.mark.parametrize("workers", [1, 3])
def test_every_task_is_done_once(workers):
    assert sorted(spread(lambda task: task**2, range(20), workers)) == [task**2 for task in range(20)]


def test_tasks_are_drawn_as_they_are_needed():
    drawn = []

    def tasks():
        for number in range(100):
            drawn.append(number)
            yield number

    done = 0
    for _ in spread(lambda task: os.getpid(), tasks(), workers=2):
        done += 1
        assert len(drawn) <= done + 4
    assert done == 100


def test_what_a_task_raises_is_raised():
    def refuse(task):
        raise UserError(f"no {task}")

    for workers in (1, 2):
        with pytest.raises(UserError, match="no 1"):
            list(spread(refuse, [1], workers))
    with pytest.raises(RuntimeError, match=r"worker process(.|\n)*ZeroDivisionError"):
        list(spread(lambda task: 1 / task, [0], workers=2))


@pytest.mark.timeout(30)
def test_a_killed_worker_is_noticed():
    with pytest.raises(RuntimeError, match="was killed"):
        list(spread(lambda task: os.kill(os.getpid(), signal.SIGKILL), [1], workers=2))


def test_workers_end_with_a_parent_that_is_killed():
    program = """
from calm_core.data.workers import spread
for result in spread(str, iter(int, 1), workers=3):
    print(result, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        parent.stdout.readline()
        workers = psutil.Process(parent.pid).children()
        parent.kill()
        parent.stdout.close()
    assert len(workers) == 3
    _, alive = psutil.wait_procs(workers, timeout=20)
    for worker in alive:
        worker.kill()
    assert not alive
