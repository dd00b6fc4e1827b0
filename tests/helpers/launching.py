"""Process trees for tests: bounded in time, and gone afterwards."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
ALONE = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "WANDB_MODE": "disabled"}


def torchrun(ranks: int, script: Path, *arguments: object, logs: Path | None = None) -> list[str]:
    """The command line of `script` on `ranks` ranks and a free port; each rank's output goes to a file below `logs`."""
    kept = ["--redirects", "3", "--log-dir", str(logs)] if logs else []
    options = ["--standalone", "--nproc-per-node", str(ranks), *kept]
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


def launch(ranks: int, script: Path, *arguments: object, seconds: float = 200) -> None:
    """Run a script on several ranks; fails with the last words of the ranks that failed."""
    with tempfile.TemporaryDirectory() as logs:
        code, output = finish(torchrun(ranks, script, *arguments, logs=Path(logs)), seconds)
        if code:
            tails = [
                f"{path.parent.name}: {path.read_text()[-3000:]}" for path in sorted(Path(logs).rglob("stderr.log"))
            ]
            raise AssertionError("\n".join([f"exit code {code}", output[-3000:], *tails]))


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
