"""The steps of a job (srun), and attention to the signals that Slurm sends meanwhile."""

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from tempfile import TemporaryFile
from types import FrameType
from typing import IO

from calm_core.cluster.slurm import Job, SlurmError

BEAT = 0.5  # seconds between looks at the signals

MARGIN = 10.0  # seconds before the time limit at which a job that has not ended in good order is requeued as it is


class Steps:
    """Runs steps of one job. SIGUSR1 (a time limit is near) and SIGTERM (Slurm ends the job, or will) are noted.

    Attributes:
        asked: whether Slurm has asked for the end.
    """

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        self._job, self._environment = job, dict(environment)
        self._signals: list[int] = []
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._note)

    @property
    def asked(self) -> bool:
        """Whether Slurm has asked for the end."""
        return bool(self._signals)

    @property
    def decided(self) -> bool:
        """Whether Slurm is ending the job by itself: cancelled, or already back in the queue. No answer is no."""
        try:
            return self._job.fields().get("JobState") != "RUNNING"
        except SlurmError:
            return False

    def command(self, tasks_per_node: int, options: Sequence[str], module: str, *arguments: str) -> list[str]:
        """srun of a Python module, `tasks_per_node` tasks on every node; 0: one task on the first node."""
        nodes = len(self._job.nodes) if tasks_per_node else 1
        per_node = tasks_per_node or 1
        size = [f"--nodes={nodes}", f"--ntasks={nodes * per_node}", f"--ntasks-per-node={per_node}"]
        extra = shlex.split(self._environment.get("EXTRA_SRUN_ARGS", ""))
        cores = f"--cpus-per-task={self._job.cpus_per_task}"
        python = self._environment.get("CALM_PYTHON") or sys.executable
        return ["srun", *size, cores, *options, *extra, python, "-m", module, *arguments]

    def output(self, command: Sequence[str], seconds: float) -> str:
        """All that a step prints; it is ended after `seconds`, or when Slurm asks for the end."""
        with TemporaryFile("w+") as output:
            process = self._start(command, output)
            end = time.monotonic() + seconds
            while process.poll() is None:
                if self.asked or time.monotonic() > end:
                    process.terminate()
                    process.wait()
                time.sleep(BEAT)
            output.seek(0)
            return output.read()

    def run(self, command: Sequence[str], on_asked: Callable[[], None]) -> int:
        """Run a step to its end; srun's exit code.

        What Slurm asks for is passed on as SIGUSR1, once, and `on_asked` called; what it does itself is not passed on.
        """
        process, deadline, passed_on = self._start(command), float("inf"), False
        while process.poll() is None and time.time() < deadline:
            if self.asked and not passed_on:
                passed_on = True
                if not self.decided:  # else Slurm has told the ranks, and puts an end to them itself
                    process.send_signal(signal.SIGUSR1)
                    deadline = _end_of(self._job) - MARGIN
                on_asked()
            time.sleep(BEAT)
        return process.returncode if process.returncode is not None else -signal.SIGKILL

    def _start(self, command: Sequence[str], output: IO[str] | None = None) -> subprocess.Popen:
        # A session of its own: a signal to the batch script is the batch script's to pass on.
        errors = output and subprocess.STDOUT
        return subprocess.Popen(command, env=self._environment, stdout=output, stderr=errors, start_new_session=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)


def say(text: str) -> None:
    """A line in the main log."""
    print(f"[{time.strftime('%F %T')}] {text}", flush=True)


def last_lines(text: str, count: int) -> str:
    """The last lines of a log."""
    return "\n".join(text.splitlines()[-count:])


def _end_of(job: Job) -> float:
    """When Slurm will end the job, in seconds since 1970, as far as it says so."""
    try:
        return datetime.fromisoformat(job.fields()["EndTime"]).timestamp()
    except (SlurmError, KeyError, ValueError):  # ValueError: without a time limit
        return float("inf")
