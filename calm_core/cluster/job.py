"""A job from start to end: `python -m calm_core.cluster.job --stage STAGE --config DEFAULT [CONFIG] [key=value ...]`.

The batch script becomes this process. It checks the configuration and the nodes, runs the stage, and then decides
whether the job goes back into the queue. It runs outside any container and needs neither torch nor a GPU.
"""

import argparse
import fcntl
import os
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from calm_core.cluster.slurm import Job, SlurmError
from calm_core.cluster.status import (
    StageRecords,
    attempts_without_progress,
    endings,
    first_failure,
    progress_of,
    write_record,
)
from calm_core.cluster.steps import Steps, last_lines, log
from calm_core.errors import ExitCode, UserError
from calm_core.io import read_json
from calm_core.workflow.ledger import Ledger, stamp

ROOT = Path(__file__).parents[2]

LOG_LINES = 25  # of the failing rank's log that the main log repeats

LOCK_MINUTES = 15.0  # a process on a lost node may hold the run's lock for as long as a collective may take

Reports = Mapping[str, Mapping[str, Any]]  # what `preflight` found on each node that reported


def main(arguments: Sequence[str]) -> int:
    """Run a stage as this job; the exit code for Slurm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--config", required=True, help="used unless another one is given")
    parser.add_argument("--list", help="file with a configuration and its key=value on each line")
    parser.add_argument("--finish", action="store_true", help="combine what the tasks of an array have made")
    parser.add_argument("experiment", nargs="*", help="[CONFIG.yaml] [key=value ...]")
    parsed = parser.parse_intermixed_args(arguments)
    try:
        job = Job.of(os.environ)
        request, port = read_request(parsed, job), job.free_port()
    except SlurmError as error:
        log(str(error))
        return ExitCode.FAILED
    except UserError as error:
        log(f"refused: {error}")
        return ExitCode.USAGE
    if request is None:
        log(f"nothing to do: line {job.array[0]} of {parsed.list} holds no configuration")
        return ExitCode.OK
    return run(job, request, port)


@dataclass(frozen=True)
class StageRequest:
    """What a job has to run.

    Attributes:
        stage: its name.
        experiment: configuration and key=value.
        options: further ones of the stage's script.
        array_task: the number of this task of an array that shares the stage; None if the job does all of it.
        share: which share of the work, counted from 0, and of how many.
    """

    stage: str
    experiment: list[str]
    options: tuple[str, ...] = ()
    array_task: int | None = None
    share: tuple[int, int] = (0, 1)


def read_request(parsed: argparse.Namespace, job: Job) -> StageRequest | None:
    """What the arguments ask for; None where the list has nothing for this task of an array.

    Raises:
        UserError: if there is no configuration, or the job is not the array that it has to be.
    """
    given = line_of(find_file(parsed.list), job) if parsed.list else parsed.experiment
    if parsed.list and not given:
        return None
    if not given or "=" in given[0]:
        given = [parsed.config, *given]
    experiment = [find_file(given[0]), *given[1:]]
    if job.array and not parsed.list:
        index, count = job.share
        return StageRequest(parsed.stage, experiment, ("--shard", f"{index}/{count}"), job.array[0], job.share)
    return StageRequest(parsed.stage, experiment, ("--finish",) if parsed.finish else ())


def find_file(path: str) -> str:
    """A path that a person has given, below the folder of submission, or else below the project.

    Raises:
        UserError: if there is no such file.
    """
    for folder in (Path(os.environ["SLURM_SUBMIT_DIR"]), ROOT):
        if (folder / path).is_file():
            return str(folder / path)
    raise UserError(f"There is no file {path}: give a configuration, as in `sbatch LAUNCHER configs/calm_m.yaml`.")


def line_of(path: str, job: Job) -> list[str]:
    """The words of this task's line of a list, counted from 1; [] for a comment or beyond the end.

    Raises:
        UserError: if the job is not an array whose tasks are lines.
    """
    lines = Path(path).read_text().splitlines()
    number = job.array[0] if job.array else 0
    if number < 1:
        raise UserError(f"{path} is a list of configurations: submit with --array=1-{len(lines)}.")
    return lines[number - 1].partition("#")[0].split() if number <= len(lines) else []


def run(job: Job, request: StageRequest, port: int) -> int:
    """Check the nodes, run the stage, decide what follows; the exit code for Slurm. Ranks connect to `port`."""
    log(f"{request.stage}: job {job.id}, restart {job.restart}, {len(job.nodes)} nodes {','.join(job.nodes)}")
    limit = int(job.environment.get("CALM_RESTARTS") or 3)
    steps = Steps(job, {**job.environment, "MASTER_ADDR": job.address, "MASTER_PORT": str(port)})
    reports = check_nodes(job, request, steps, port)
    if steps.end_requested:
        return requeue_before_start(job, steps, limit, ExitCode.STOPPED, "Slurm needs the nodes")
    if not reports:
        reason = "no node has answered: see the lines above, and launchers/site.env"
        return requeue_before_start(job, steps, limit, ExitCode.FAILED, reason)
    plan = next((report["plan"] for report in reports.values() if report["plan"]), None)
    if plan is None:  # on every node: one that alone cannot read a file is a bad node
        log(f"refused: {next(iter(reports.values()))['problems'][0]}")
        return ExitCode.USAGE
    if request.options and not plan["shareable"]:
        log(f"refused: {request.stage} cannot be divided over the tasks of an array: submit it without --array.")
        return ExitCode.USAGE
    records = StageRecords.of(Path(plan["run"]), request.stage, request.array_task)
    try:
        folder = records.attempt(f"{job.id}.{job.restart}")
    except OSError as error:
        return requeue_before_start(job, steps, limit, ExitCode.FAILED, f"no records can be kept here: {error}")
    return Attempt(job, request, steps, limit, {**plan, "share": request.share}, records, folder).run(reports)


def check_nodes(job: Job, request: StageRequest, steps: Steps, port: int) -> Reports:
    """The report of each node's preflight, by node; a node that did not answer has none."""
    seconds = float(job.environment.get("CALM_CHECK_SECONDS") or 120)
    size = ["--nodes", ",".join(job.nodes), "--tasks", str(job.tasks_per_node)]
    meeting = ["--address", job.address, "--port", str(port)]
    with TemporaryDirectory(prefix=".preflight-", dir=Path.cwd()) as folder:
        arguments = [request.stage, "--reports", folder, *size, *meeting, *request.experiment]
        command = steps.command(1, [], "calm_core.cluster.preflight", *arguments)
        printed = steps.output(command, 3 * seconds + 60)
        # By name: on NFS the listing of a folder may be older than the files in it.
        paths = {node: Path(folder, f"{node}.json") for node in job.nodes}
        reports = {node: read_json(path) for node, path in paths.items() if path.exists()}
    if printed and bad_nodes(job.nodes, reports):
        print(last_lines(printed, LOG_LINES), flush=True)
    return reports


def bad_nodes(nodes: Sequence[str], reports: Reports) -> dict[str, str]:
    """The nodes that must not be used, and why, from what each found and from which ones the others could not reach.

    One faulty node stops the all-reduce of all, so no node is excluded for that while another has a fault of its
    own, and none if the all-reduce fails although all could be reached.
    """
    bad = {node: "no answer" for node in nodes if node not in reports}
    bad |= {node: "; ".join(report["problems"]) for node, report in reports.items() if report["problems"]}
    if bad:
        return bad
    unreached = [node for report in reports.values() for node in report["unreached"]]
    # A first node that none of several others reaches is more likely at fault than all of them.
    faulty = nodes[:1] if len(unreached) == len(nodes) - 1 > 1 else unreached
    return dict.fromkeys(faulty, "not reached by the others")


def network_error(reports: Reports) -> str:
    """Why the all-reduce among the nodes failed, as one of them reports it; '' if it succeeded."""
    return next((report["network_error"] for report in reports.values() if report["network_error"]), "")


def requeue_before_start(job: Job, steps: Steps, limit: int, code: int, reason: str) -> int:
    """Requeue a job that has no records yet, after a failure at most `limit` times; the exit code for Slurm."""
    if steps.ended_by_slurm:
        return code
    if not steps.end_requested and job.restart >= limit:
        log(f"ended with code {code}: {reason}")
        return code
    log(f"requeued before the start: {reason}")
    try:
        job.requeue()
    except SlurmError as error:
        log(f"Slurm does not requeue it: {error}")
    return code


@dataclass(frozen=True)
class Decision:
    """Whether the job goes back into the queue, and why."""

    requeue: bool
    reason: str


def decide(code: int, end_requested: bool, fruitless: int, limit: int) -> Decision:
    """What to do with a job whose processes have ended.

    Args:
        code: exit code of the process that failed first, negative if a signal killed it; 0 or 75 if none failed.
        end_requested: whether Slurm had asked for the end (time limit, preemption).
        fruitless: attempts of this job in a row, this one included, that began at the step where it still is.
        limit: restarts without progress that are allowed.
    """
    if code == ExitCode.OK:
        return Decision(False, "finished")
    if code == ExitCode.USAGE:
        return Decision(False, "an error of configuration, which a restart would repeat: correct it and submit again")
    if end_requested:
        return Decision(True, "Slurm needed the nodes; the next start continues from the checkpoint")
    if code == ExitCode.STOPPED:
        return Decision(False, "stopped by a person, checkpoint saved; submit again to continue")
    if fruitless > limit:
        return Decision(False, f"{limit} restarts without progress: look for the cause and submit again")
    return Decision(True, f"restart {fruitless} of {limit} without progress" if fruitless else "it has made progress")


@dataclass(frozen=True)
class Attempt:
    """One start of a job, the first or one after a requeue, once its configuration is known to be sound.

    Attributes:
        job: that this process belongs to.
        request: what it has to run.
        steps: of the job.
        limit: restarts without progress that are allowed.
        plan: what `preflight` made of the configuration, and the share of the task.
        records: of the stage, over all attempts.
        folder: of this attempt, in them.
    """

    job: Job
    request: StageRequest
    steps: Steps
    limit: int
    plan: Mapping[str, Any]
    records: StageRecords
    folder: Path

    def run(self, reports: Reports) -> int:
        """Run the stage if the nodes are sound, and decide; the exit code for Slurm."""
        bad = bad_nodes(self.job.nodes, reports)
        for node, problem in bad.items():
            log(f"bad node {node}: {problem}")
        if (fruitless := self._fruitless()) > self.limit:
            return self._end(ExitCode.FAILED, f"given up after {fruitless} attempts without progress")
        self._note("start", step=progress_of(self.plan), nodes=self.job.nodes)
        if bad:
            self._note("bad nodes", nodes=bad)
            return self._finish(ExitCode.FAILED, exclude=bad)
        if problem := network_error(reports):
            log(f"the all-reduce failed although each node passed its checks, so none is excluded: {problem}")
            self._note("no all-reduce", problem=problem)
            return self._finish(ExitCode.FAILED)
        if self.plan["layout"]:
            log(self.plan["layout"])
        write_record(self.folder, ROOT, self.plan, self.job.nodes)
        self._await_lock()
        return self._finish(self._run_stage())

    def _run_stage(self) -> int:
        """Run the stage's script and note its success in the workflow's ledger; the exit code.

        The script runs even if the stage is finished: it knows its inputs, and says so.
        """
        plan, step = self.plan, progress_of(self.plan)
        was_there, began = Path(plan["product"]).exists(), time.time()
        code = self._run_ranks()
        if code == ExitCode.OK and plan["training"] and was_there and progress_of(plan) == step:
            log(f"finished before: {plan['product']} is there")
        if code == ExitCode.OK and self.request.array_task is None and plan["inputs"]:
            ledger, stage = Ledger(Path(plan["run"]) / "stages.json"), self.request.stage
            products = [Path(product) for product in plan["products"]]
            ledger.note(stage, ledger.seconds(stage) + time.time() - began, stamp(plan["inputs"], products))
        return code

    def _run_ranks(self) -> int:
        """Run the script on all ranks; the code of the rank that failed first, whose last lines are repeated here."""
        tasks = self.job.tasks_per_node if self.plan["training"] else 0
        logs = str(self.folder).replace("%", "%%") + "/rank-%4t.log"
        options = [f"--output={logs}", "--open-mode=append", "--kill-on-bad-exit=1", "--wait=60"]
        arguments = [str(self.folder / "ranks"), *self.plan["command"], *self.request.options]
        log(f"starting {' '.join(arguments[1:])}")
        log(f"logs: {self.folder}/rank-*.log")
        command = self.steps.command(tasks, options, "calm_core.cluster.steps", *arguments)
        code = self.steps.run(command, self._on_request, self.plan["environment"])
        ended = endings(self.folder, self.job.world if tasks else 1)
        if failure := first_failure(ended):
            who = f"rank {failure['rank']} on {failure['node']}"
            log(f"{who} failed first, code {failure['code']}; its last lines:")
            path = self.folder / f"rank-{failure['rank']:04}.log"
            print(last_lines(path.read_text(errors="replace") if path.exists() else "", LOG_LINES), flush=True)
            self._note("failure", who=who, code=failure["code"], log=str(path))
            return failure["code"]
        return ExitCode.STOPPED if any(ending["code"] == ExitCode.STOPPED for ending in ended) else code

    def _finish(self, code: int, exclude: Collection[str] = ()) -> int:
        """Requeue the job, without the nodes to exclude, or end it; the exit code for Slurm."""
        self._note("end", code=code, step=progress_of(self.plan))
        if code != ExitCode.OK and self.steps.ended_by_slurm:
            log("Slurm has ended this job by itself")
            return ExitCode.STOPPED
        decision = decide(code, self.steps.end_requested, self._fruitless(), self.limit)
        if not decision.requeue:
            return self._end(code, decision.reason)
        log(f"requeued: {decision.reason}")
        self._note("requeue", reason=decision.reason, without=list(exclude))
        return self._requeue(code, exclude)

    def _requeue(self, code: int, exclude: Collection[str]) -> int:
        try:
            self.job.requeue()
        except SlurmError as error:
            if not self.steps.ended_by_slurm:  # else it is in the queue already, or was cancelled just now
                return self._end(code, f"Slurm does not requeue it: {error}")
        try:
            if exclude:
                self.job.exclude(exclude)
        except SlurmError as error:
            log(f"Slurm does not exclude {', '.join(exclude)}: {error}")
        return ExitCode.STOPPED

    def _end(self, code: int, reason: str) -> int:
        log(f"ended with code {code}: {reason}")
        self._note("over", code=code, reason=reason)
        return code if code >= 0 else ExitCode.FAILED

    def _fruitless(self) -> int:
        return attempts_without_progress(self.records.journal(), self.job.id, progress_of(self.plan))

    def _on_request(self) -> None:
        """Note that Slurm asks for the end, or which lost node makes it end the job."""
        lost = self.job.lost_nodes()
        log(f"lost {', '.join(lost)}" if lost else "Slurm asks for the end: the ranks are signalled")
        self._note("lost" if lost else "asked", nodes=lost)

    def _note(self, event: str, **values: Any) -> None:
        self.records.note(self.job.id, self.job.restart, event, **values)

    def _await_lock(self) -> None:
        """After a restart, wait until the processes of the attempt before have released the run."""
        path = Path(self.plan["training"]) / ".lock"
        if not (self.job.restart and self.plan["training"] and path.exists()):
            return
        end = time.monotonic() + 60 * LOCK_MINUTES
        with open(path) as lock:
            while time.monotonic() < end and not self.steps.end_requested:
                try:
                    return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(1)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
