import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from launching import finish, running

from calm_core.errors import ExitCode
from calm_core.workflow.process import _end_with_parent, run_process

PARENT = """
import sys
from calm_core.workflow.process import StoppedError, run_process, stoppable
try:
    with stoppable():
        run_process([sys.executable, "-c", sys.argv[1]], {}, lambda seconds: None)
except StoppedError as stopped:
    print("stopped by", stopped)
"""

# Writes its id and that of a child of its own once both are there; waits for both.
CHILD = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open("{file}.new", "w").write(f"{{os.getpid()}} {{child.pid}}")
os.rename("{file}.new", "{file}")
child.wait()
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("code", "expected"),
    [("", 0), ("raise SystemExit(2)", 2), ("import os; os.kill(os.getpid(), 9)", ExitCode.FAILED)],
)
def test_the_exit_code_is_the_commands(code, expected):
    reported = []
    assert run_process(python(code), {}, reported.append) == expected
    assert len(reported) == 1


def test_the_environment_is_added_to_this_ones():
    check = "import os; assert os.environ['NEW'] == '1' and 'PATH' in os.environ"
    assert run_process(python(check), {"NEW": "1"}, lambda seconds: None) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_descendant_outlives_a_stopped_process(tmp_path, number):
    file = tmp_path / "pids"
    with running([*python(PARENT), CHILD.format(file=file)]) as parent:
        child, grandchild = (psutil.Process(int(pid)) for pid in wait_for(file).split())
        os.kill(parent.pid, number)
        parent.wait(60)
        await_true(lambda: is_gone(child))
        if number != signal.SIGKILL:  # after SIGKILL no process is left that could end the child's children
            await_true(lambda: is_gone(grandchild))
            assert f"stopped by {signal.Signals(number).name}" in parent.stdout.read()
        with suppress(psutil.NoSuchProcess):
            grandchild.kill()


def test_a_process_whose_parent_ended_before_it_started_ends_too():
    with subprocess.Popen(["sleep", "60"], preexec_fn=partial(_end_with_parent, 1)) as orphan:  # not a child of 1
        assert orphan.wait(30) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("code", "expected"), [("", 0), ("raise SystemExit(2)", 2), ("import os; os.kill(os.getpid(), 9)", 1)]
)
def test_torchrun_ends_with_the_code_of_its_processes(tmp_path, code, expected):
    script = tmp_path / "script.py"
    script.write_text(code)
    arguments = ["--standalone", "--nproc-per-node", "2", str(script)]
    found, output = finish([sys.executable, "-m", "calm_core.distributed.torchrun", *arguments], seconds=120)
    assert found == expected
    assert "Traceback" not in output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 75)])
def test_torchrun_passes_a_signal_on_and_ends_with_its_code(tmp_path, number, code):
    script, told = tmp_path / "script.py", tmp_path / "told"
    script.write_text(f"""
import pathlib, signal, sys, time
def end(number, frame):
    pathlib.Path({str(told)!r}).write_text(signal.Signals(number).name)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, end)
pathlib.Path({str(tmp_path / "ready")!r}).touch()
time.sleep(100)
""")
    arguments = ["--standalone", "--nproc-per-node", "1", str(script)]
    with running([sys.executable, "-m", "calm_core.distributed.torchrun", *arguments]) as launcher:
        await_true((tmp_path / "ready").exists)
        os.kill(launcher.pid, number)
        assert launcher.wait(60) == code
    assert told.read_text() in ("SIGTERM", "SIGINT")


def wait_for(file: Path) -> str:
    await_true(file.exists)
    return file.read_text()


def is_gone(process: psutil.Process) -> bool:
    """A process that nobody has reaped counts as gone."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def await_true(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
