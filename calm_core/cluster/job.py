"""A job from start to end: `python -m calm_core.cluster.job --stage STAGE --config DEFAULT [CONFIG] [key=value ...]`.

The batch script becomes this process. It checks configuration and nodes, starts the ranks, and decides when they have
ended whether the job goes back into the queue. It runs outside a container and needs neither torch nor a GPU.
"""

import argparse
import fcntl
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from calm_core.cluster.policy import bad_nodes, decide, first_failure, fruitless_attempts, unmet
from calm_core.cluster.slurm import Job, SlurmError
from calm_core.cluster.status import StageRecords, endings, progress_of, write_record
from calm_core.cluster.steps import Steps, last_lines, say
from calm_core.errors import ExitCode, UserError
from calm_core.io import read_json
from calm_core.workflow.stages import Ledger, stamp

ROOT = Path(__file__).parents[2]

LINES = 25  # of the failing rank's log that the main log repeats

LOCK_MINUTES = 15.0  # a process on a node that was lost may live, and hold the run, as long as a collective may take


def main(arguments: Sequence[str]) -> int:
    """Run a stage as this job; the exit code for Slurm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--config", required=True, help="used unless another one is given")
    parser.add_argument("--list", help="file with a configuration and its key=value on each line")
    parser.add_argument("--finish", action="store_true", help="put together what the tasks of an array have made")
    parser.add_argument("experiment", nargs="*", help="[CONFIG.yaml] [key=value ...]")
    parsed = parser.parse_intermixed_args(arguments)
    try:
        attempt = begin(Job.of(os.environ), parsed)
    except SlurmError as silence:
        say(str(silence))
        return ExitCode.FAILED
    except UserError as refusal:
        say(f"refused: {refusal}")
        return ExitCode.USAGE
    return attempt.run() if attempt else ExitCode.OK


def begin(job: Job, parsed: argparse.Namespace) -> "Attempt | None":
    """The attempt that the arguments ask for; None where the list has nothing for this task.

    Raises:
        UserError: if the job is not the array that it should be.
    """
    given = line_of(place(parsed.list), job) if parsed.list else parsed.experiment
    if parsed.list and not given:
        say(f"nothing to do: line {job.array[0]} of {parsed.list} holds no configuration")
        return None
    if not given or "=" in given[0]:
        given = [parsed.config, *given]
    given[0] = place(given[0])
    return Attempt(job, parsed.stage, given, parsed.finish, shared=not parsed.list)


def place(path: str) -> str:
    """A path that someone has given: where the job was submitted from, else below the project."""
    near = Path(os.environ["SLURM_SUBMIT_DIR"], path)
    return str(near if near.exists() else ROOT / path)


def line_of(path: str, job: Job) -> list[str]:
    """The words of the line of a list that is this task's, counted from 1; none for a comment or beyond the end.

    Raises:
        UserError: if the job is no array whose tasks are lines.
    """
    lines = Path(path).read_text().splitlines()
    task = job.array[0] if job.array else 0
    if task < 1:
        raise UserError(f"{path} is a list of configurations: submit with --array=1-{len(lines)}.")
    return lines[task - 1].partition("#")[0].split() if task <= len(lines) else []


class Attempt:
    """One start of a job, the first or after a requeue."""

    def __init__(self, job: Job, stage: str, experiment: list[str], finish: bool, shared: bool) -> None:
        self._job, self._stage, self._experiment = job, stage, experiment
        self._options = ["--finish"] if finish else []
        self._task, self._share = None, (0, 1)
        if shared and job.array:
            self._task, self._share = job.array[0], job.share
            self._options = ["--shard", "{}/{}".format(*self._share)]
        self._limit = int(os.environ.get("CALM_RESTARTS") or 3)
        self._steps = Steps(job, os.environ | {"MASTER_ADDR": job.address, "MASTER_PORT": str(job.port)})

    def run(self) -> int:
        """Check, train, decide; the exit code for Slurm."""
        job = self._job
        say(f"{self._stage}: job {job.id}, restart {job.restart}, {len(job.nodes)} nodes {','.join(job.nodes)}")
        verdicts = self._check()
        if self._steps.asked:
            return self._give_way(ExitCode.STOPPED, "Slurm needs the nodes")
        if not verdicts:
            return self._give_way(ExitCode.FAILED, "no node has answered: see the lines above, and launchers/site.env")
        plan = next((verdict["plan"] for verdict in verdicts.values() if verdict["plan"]), None)
        if plan is None:  # by all of them: a node that alone cannot read a file is a bad node
            say(f"refused: {next(iter(verdicts.values()))['problems'][0]}")
            return ExitCode.USAGE
        bad = bad_nodes(job.nodes, verdicts)
        for node, problem in bad.items():
            say(f"bad node {node}: {problem}")
        self._plan = {**plan, "share": self._share}
        self._records = StageRecords.of(Path(plan["run"]), self._stage, self._task)
        try:
            self._folder = self._records.attempt(f"{job.id}.{job.restart}")
        except OSError as error:
            return self._give_way(ExitCode.FAILED, f"no records can be kept here: {error}")
        if (fruitless := self._fruitless()) > self._limit:
            return self._end(ExitCode.FAILED, f"given up after {fruitless} attempts without progress")
        self._note("start", step=progress_of(self._plan), nodes=job.nodes)
        if bad:
            self._note("bad nodes", nodes=bad)
            return self._judge(ExitCode.FAILED, exclude=bad)
        if problem := unmet(verdicts):
            say(f"no all-reduce among nodes that are each sound, so that none can be named: {problem}")
            self._note("no all-reduce", problem=problem)
            return self._judge(ExitCode.FAILED)
        return self._start()

    def _start(self) -> int:
        """Run the stage's script. Whether it has been finished before is the script's to say: it knows its inputs."""
        plan = self._plan
        if plan["layout"]:
            say(plan["layout"])
        write_record(self._folder, ROOT, plan, self._job.nodes)
        self._await_lock()
        began, before, there = time.time(), progress_of(plan), Path(plan["product"]).exists()
        code = self._train()
        if code == ExitCode.OK and plan["training"] and there and progress_of(plan) == before:
            say(f"finished before: {plan['product']} is there")
        if code == ExitCode.OK and self._task is None and plan["inputs"]:
            ledger = Ledger(Path(plan["run"]) / "stages.json")
            products = [Path(product) for product in plan["products"]]
            ledger.note(self._stage, ledger.seconds(self._stage) + time.time() - began, stamp(plan["inputs"], products))
        return self._judge(code)

    def _check(self) -> dict[str, dict[str, Any]]:
        """The verdict of each node's preflight, by node."""
        seconds = float(os.environ.get("CALM_CHECK_SECONDS") or 120)
        job = self._job
        size = ["--nodes", ",".join(job.nodes), "--tasks", str(job.tasks_per_node)]
        meeting = ["--address", job.address, "--port", str(job.port)]
        with TemporaryDirectory(prefix=".preflight-", dir=Path.cwd()) as folder:
            arguments = [self._stage, "--verdicts", folder, *size, *meeting, *self._experiment]
            command = self._steps.command(1, [], "calm_core.cluster.preflight", *arguments)
            printed = self._steps.output(command, 3 * seconds + 60)
            # By name: on NFS the listing of a folder may be older than the files in it.
            files = {node: Path(folder, f"{node}.json") for node in job.nodes}
            verdicts = {node: read_json(path) for node, path in files.items() if path.exists()}
        if printed and bad_nodes(job.nodes, verdicts):
            print(last_lines(printed, LINES), flush=True)
        return verdicts

    def _train(self) -> int:
        """Run the ranks; the code of the one that failed first, whose last lines are repeated here."""
        tasks = self._job.tasks_per_node if self._plan["training"] else 0
        logs = str(self._folder).replace("%", "%%") + "/rank-%4t.log"
        options = [f"--output={logs}", "--open-mode=append", "--kill-on-bad-exit=1", "--wait=60"]
        arguments = [str(self._folder / "ranks"), *self._plan["command"], *self._options]
        say(f"starting {' '.join(arguments[1:])}")
        say(f"logs: {self._folder}/rank-*.log")
        code = self._steps.run(self._steps.command(tasks, options, "calm_core.cluster.rank", *arguments), self._asked)
        records = endings(self._folder, self._job.world if tasks else 1)
        if failure := first_failure(records):
            who = f"rank {failure['rank']} on {failure['node']}"
            say(f"{who} failed first, code {failure['code']}; its last lines:")
            log = self._folder / f"rank-{failure['rank']:04}.log"
            print(last_lines(log.read_text(errors="replace"), LINES), flush=True)
            self._note("failure", who=who, code=failure["code"], log=str(log))
            return failure["code"]
        if any(record["code"] == ExitCode.STOPPED for record in records):
            return ExitCode.STOPPED
        return code

    def _judge(self, code: int, exclude: Iterable[str] = ()) -> int:
        """Requeue the job or end it."""
        self._note("end", code=code, step=progress_of(self._plan))
        if code != ExitCode.OK and self._steps.decided:
            say("Slurm has ended this job by itself")
            return ExitCode.STOPPED
        verdict = decide(code, self._steps.asked, self._fruitless(), self._limit)
        if not verdict.again:
            return self._end(code, verdict.reason)
        say(f"requeued: {verdict.reason}")
        self._note("requeue", reason=verdict.reason, without=list(exclude))
        return self._requeue(code, list(exclude))

    def _requeue(self, code: int, exclude: list[str]) -> int:
        try:
            self._job.requeue()
        except SlurmError as refusal:
            if not self._steps.decided:  # else it is in the queue already, or cancelled in this very moment
                return self._end(code, f"Slurm does not requeue it: {refusal}")
        try:
            if exclude:
                self._job.exclude(exclude)
        except SlurmError as refusal:
            say(f"Slurm does not exclude {', '.join(exclude)}: {refusal}")
        return ExitCode.STOPPED

    def _give_way(self, code: int, reason: str) -> int:
        """Back into the queue before there are records of the job; by itself as often as it may fail to progress."""
        if self._steps.decided:
            return code
        if not self._steps.asked and self._job.restart >= self._limit:
            say(f"ended with code {code}: {reason}")
            return code
        say(f"requeued before the start: {reason}")
        try:
            self._job.requeue()
        except SlurmError as refusal:
            say(f"Slurm does not requeue it: {refusal}")
        return code

    def _end(self, code: int, reason: str) -> int:
        say(f"ended with code {code}: {reason}")
        self._note("over", code=code, reason=reason)
        return code if code >= 0 else ExitCode.FAILED

    def _fruitless(self) -> int:
        return fruitless_attempts(self._records.journal(), self._job.id, progress_of(self._plan))

    def _asked(self) -> None:
        """Slurm asks for the end, unless it is a lost node that ends the job."""
        lost = self._job.lost_nodes()
        say(f"lost {', '.join(lost)}" if lost else "Slurm asks for the end: the ranks are told")
        self._note("lost" if lost else "asked", nodes=lost)

    def _note(self, event: str, **values: Any) -> None:
        self._records.note(self._job.id, self._job.restart, event, **values)

    def _await_lock(self) -> None:
        """After a restart, wait for what is left of the attempt before to let go of the run."""
        path = Path(self._plan["training"]) / ".lock"
        if not (self._job.restart and self._plan["training"] and path.exists()):
            return
        end = time.monotonic() + 60 * LOCK_MINUTES
        with open(path) as lock:
            while time.monotonic() < end and not self._steps.asked:
                try:
                    return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(1)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
