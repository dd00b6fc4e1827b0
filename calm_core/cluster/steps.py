"""The steps of a job (srun), the signals that Slurm sends while they run, and the process of each rank.

`python -m calm_core.cluster.steps RECORDS SCRIPT ARGUMENTS` is one rank under srun. It runs the script and writes
RECORDS/RANK.json when the script has ended: srun returns the code of a process that it killed itself, not the code of
the process that failed first.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from types import FrameType
from typing import IO

from calm_core.cluster.slurm import Job, SlurmError
from calm_core.errors import ExitCode
from calm_core.io import write_json

POLL_SECONDS = 0.5  # between looks at the step and the signals

# Before the time limit: a job that has not ended by itself is then requeued without waiting any longer.
REQUEUE_SECONDS = 10.0


class Steps:
    """Runs steps of one job, and notes SIGUSR1 (a time limit is near) and SIGTERM (Slurm ends the job, or will)."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        self._job, self._environment = job, dict(environment)
        self._signals: list[int] = []
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._note)

    @property
    def end_requested(self) -> bool:
        """Whether Slurm has asked for the end of the job."""
        return bool(self._signals)

    @property
    def ended_by_slurm(self) -> bool:
        """Whether Slurm is ending the job by itself: cancelled, or already in the queue again. False without answer."""
        try:
            return self._job.fields().get("JobState") != "RUNNING"
        except SlurmError:
            return False

    def command(self, tasks_per_node: int, options: Sequence[str], module: str, *arguments: str) -> list[str]:
        """srun of a Python module, `tasks_per_node` tasks on every node; 0: one task on the first node."""
        nodes = len(self._job.nodes) if tasks_per_node else 1
        per_node = tasks_per_node or 1
        size = [f"--nodes={nodes}", f"--ntasks={nodes * per_node}", f"--ntasks-per-node={per_node}"]
        cores = f"--cpus-per-task={self._job.cpus_per_task}"
        extra = shlex.split(self._environment.get("EXTRA_SRUN_ARGS", ""))
        python = self._environment.get("CALM_PYTHON") or sys.executable
        # --export=ALL: with sbatch --export=NONE, or SBATCH_EXPORT, srun would drop what the launcher has set.
        return ["srun", "--export=ALL", *size, cores, *options, *extra, python, "-m", module, *arguments]

    def output(self, command: Sequence[str], seconds: float) -> str:
        """Everything that a step prints; it is ended after `seconds`, or when Slurm asks for the end."""
        with TemporaryFile("w+") as output:
            process = self._start(command, {}, output)
            end = time.monotonic() + seconds
            while process.poll() is None:
                if self.end_requested or time.monotonic() > end:
                    process.terminate()
                    process.wait()
                time.sleep(POLL_SECONDS)
            output.seek(0)
            return output.read()

    def run(self, command: Sequence[str], on_request: Callable[[], None], added: Mapping[str, str]) -> int:
        """Run a step to its end, with `added` variables; srun's exit code.

        A request for the end is passed on as SIGUSR1, once, and `on_request` is called. It is not passed on if Slurm is
        ending the job by itself: then it signals the ranks too.
        """
        process, deadline, passed_on = self._start(command, added), float("inf"), False
        while process.poll() is None and time.time() < deadline:
            if self.end_requested and not passed_on:
                passed_on = True
                if not self.ended_by_slurm:
                    process.send_signal(signal.SIGUSR1)
                    deadline = _end_of(self._job) - REQUEUE_SECONDS
                on_request()
            time.sleep(POLL_SECONDS)
        return process.returncode if process.returncode is not None else -signal.SIGKILL

    def _start(
        self, command: Sequence[str], added: Mapping[str, str], output: IO[str] | None = None
    ) -> subprocess.Popen:
        # In its own session: signals to the batch script reach this process alone, which passes them on.
        errors = output and subprocess.STDOUT
        environment = {**self._environment, **added}
        return subprocess.Popen(command, env=environment, stdout=output, stderr=errors, start_new_session=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)


def log(text: str) -> None:
    """A line in the main log."""
    print(f"[{time.strftime('%F %T')}] {text}", flush=True)


def last_lines(text: str, count: int) -> str:
    """The last lines of a text."""
    return "\n".join(text.splitlines()[-count:])


def _end_of(job: Job) -> float:
    """When Slurm will end the job, in seconds since 1970; infinity if it does not say."""
    try:
        return datetime.fromisoformat(job.fields()["EndTime"]).timestamp()
    except (SlurmError, KeyError, ValueError):  # ValueError: without a time limit
        return float("inf")


def run_rank(records: Path, command: Sequence[str]) -> int:
    """Run the script of this rank; its exit code, but 0 when it was stopped: else srun would kill ranks that save."""
    # Slurm signals the script too. A handler, since a child would inherit that a signal is ignored.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    environment = {**os.environ, **rank_variables(os.environ)}
    code = subprocess.run([sys.executable, *command], env=environment, check=False).returncode
    rank, node = int(os.environ["SLURM_PROCID"]), os.environ.get("SLURMD_NODENAME", "")
    write_json(records / f"{rank}.json", {"rank": rank, "node": node, "code": code, "time": time.time()})
    if code == ExitCode.STOPPED:
        return ExitCode.OK
    return code if code >= 0 else 128 - code


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would set for this rank; nothing for a process that runs alone.

    A task that sees only its own GPU of those on the node (--gpus-per-task) has it as GPU 0.
    """
    if environment["SLURM_NTASKS"] == "1":
        return {}
    visible = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    only_own = 0 < len(visible) < int(environment.get("SLURM_GPUS_ON_NODE", "0"))
    local = "0" if only_own else environment["SLURM_LOCALID"]
    return {"RANK": environment["SLURM_PROCID"], "WORLD_SIZE": environment["SLURM_NTASKS"], "LOCAL_RANK": local}


if __name__ == "__main__":
    raise SystemExit(run_rank(Path(sys.argv[1]), sys.argv[2:]))
