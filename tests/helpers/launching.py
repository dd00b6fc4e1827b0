"""Process trees for tests: bounded in time, and gone afterwards."""

import io
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from unittest.mock import patch

import psutil

ROOT = Path(__file__).parents[2]
FORKED = Path(__file__).with_name("forked_ranks.py")
ALONE = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "WANDB_MODE": "disabled"}


def torchrun(ranks: int, script: Path, *arguments: object) -> list[str]:
    """The command line of `script` on `ranks` ranks and a free port."""
    options = ["--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, "-m", "calm_core.distributed.torchrun", *options, str(script), *map(str, arguments)]


@contextmanager
def running(command: Sequence[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own; at the end every process that descends from it is killed, by its id."""
    process = subprocess.Popen(
        command,
        env=os.environ | ALONE | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=ROOT,
    )
    family = {process.pid: psutil.Process(process.pid)}
    try:
        yield process
    finally:
        for relative in [*_descendants(process.pid), *family.values()]:
            if relative.is_running():
                relative.kill()
        process.wait()
        process.stdout.close()


def finish(command: Sequence[str], seconds: float, **environment: str) -> tuple[int, str]:
    """Run a command to its end: exit code and output. A run longer than `seconds` is killed and fails the test."""
    with running(command, **environment) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as late:
            raise AssertionError(f"still running after {seconds} s: {' '.join(command)}\n{late.output}") from late
    return process.returncode, output


def launch(ranks: int, script: Path, *arguments: object, seconds: float = 200) -> str:
    """Run a script on several ranks, or by itself, forked: what it prints; fails unless all ranks end with 0."""
    code, output = forked(ranks if ranks > 1 else 0, list(map(str, [script, *arguments])), seconds)
    assert code == 0, f"exit code {code}\n{output[-6000:]}"
    return output


def forked(ranks: int, words: Sequence[str], seconds: float, **environment: str) -> tuple[int, str]:
    """Run a script in processes forked from one of this session that has imported what a training needs.

    With 0 ranks it runs by itself, else as under torchrun. Exit code and output, as those of `finish`.
    """
    server = _forking_server()
    with tempfile.NamedTemporaryFile(mode="r") as output:
        given = os.environ | ALONE | {"PYTHONPATH": str(ROOT)} | environment
        print(json.dumps([output.name, given, ranks, *words]), file=server.stdin, flush=True)
        leader = _answer(server, "leader")
        late = threading.Timer(seconds, _kill_tree, [leader])
        late.start()
        try:
            code = _answer(server, "code")
        except BaseException:  # its answer would still come, and be read as that of the next call
            _kill_tree(leader)
            _forking_server.cache_clear()
            raise
        finally:
            late.cancel()
        assert code >= 0, f"still running after {seconds} s: {words}\n{output.read()}"
        return code, output.read()


def _answer(server: subprocess.Popen[str], name: str) -> int:
    """The next answer of this name; other lines are of what the server has imported."""
    return next(int(line.split()[1]) for line in server.stdout if line.startswith(f"{name} "))


@cache
def _forking_server() -> subprocess.Popen[str]:
    """A process that runs `forked_ranks.py` until this one ends."""
    return subprocess.Popen(
        [sys.executable, FORKED],
        env=os.environ | ALONE | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=ROOT,
    )


def _kill_tree(pid: int) -> None:
    for process in [*_descendants(pid), psutil.Process(pid)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def run_script(script: Path, *arguments: object) -> tuple[int, str]:
    """Run a script to its end in this process, which has imported what it needs already: exit code and output."""
    output, argv = io.StringIO(), [str(script), *map(str, arguments)]
    with patch.object(sys, "argv", argv), redirect_stdout(output), redirect_stderr(output):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0), output.getvalue()
    return 0, output.getvalue()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
