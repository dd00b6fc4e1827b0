"""The records that a stage leaves in RUN/slurm/STAGE/, and the state of a run read from them.

journal.jsonl           one line an event: start, end, requeue, ...
latest -> JOB.RESTART   the last attempt
JOB.RESTART/            rank-0000.log ..., ranks/0.json ... (how each ended), record.json, config.yaml
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calm_core.checkpoint.folder import list_checkpoints
from calm_core.cluster import slurm
from calm_core.cluster.launcher import enter_work_folder
from calm_core.config import command
from calm_core.errors import ExitCode, UserError
from calm_core.io import append_json_line, read_json, read_json_lines, write_json

# Prefixes of the environment variables that decide how a job runs; none may hold a secret.
RECORDED = ("SLURM_", "NCCL_", "CALM_", "CUDA_", "OMP_", "GLOO_", "TORCH_", "UCX_", "FI_")

BUILDING = "building"  # the journal of `data.builder`, which needs packages that the host may not have

FAILURES = ("failure", "bad nodes", "no all-reduce")


class StageRecords:
    """The folder of a stage; of one task, if an array shares the stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._journal = folder / "journal.jsonl"

    @classmethod
    def of(cls, run: Path, stage: str, task: int | None) -> "StageRecords":
        """The records of a stage of a run."""
        return cls(run / "slurm" / (stage if task is None else f"{stage}-{task}"))

    def note(self, job: str, restart: int, event: str, **values: Any) -> None:
        """Append an event to the journal."""
        line = {"time": round(time.time(), 3), "job": job, "restart": restart, "event": event, **values}
        append_json_line(self._journal, line)

    def journal(self) -> list[dict[str, Any]]:
        """All events so far."""
        return read_json_lines(self._journal)

    def attempt(self, name: str) -> Path:
        """The folder of a new attempt, which `latest` then points to."""
        folder = self.folder / name
        (folder / "ranks").mkdir(parents=True, exist_ok=True)
        pointer = self.folder / "latest.new"
        pointer.unlink(missing_ok=True)
        pointer.symlink_to(name)
        pointer.replace(self.folder / "latest")
        return folder


def endings(attempt: Path, world: int) -> list[dict[str, Any]]:
    """How the ranks of an attempt ended; those that were lost together with their node have recorded nothing."""
    paths = [attempt / "ranks" / f"{rank}.json" for rank in range(world)]
    return [read_json(path) for path in paths if path.exists()]


def first_failure(endings: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The ending of the rank that failed first: it is the cause, the others followed. None if no rank failed."""
    failures = [ending for ending in endings if ending["code"] not in (ExitCode.OK, ExitCode.STOPPED)]
    return min(failures, key=lambda ending: ending["time"], default=None)


def attempts_without_progress(journal: Sequence[Mapping[str, Any]], job: str, step: int) -> int:
    """Attempts of a job in a row, back from the last one, that began at `step` and that Slurm did not ask to end.

    An attempt that has no end in the journal was lost together with its node: it counts.
    """
    count = 0
    for event in reversed(journal):
        if event["job"] != job or event["event"] == "asked":
            break
        if event["event"] == "start":
            if event["step"] != step:
                break
            count += 1
    return count


def write_record(attempt: Path, root: Path, plan: Mapping[str, Any], nodes: tuple[str, ...]) -> None:
    """Write what runs and where: code version, configuration, software, nodes, environment."""
    (attempt / "config.yaml").write_text(plan["config"])
    content = {
        **{name: plan[name] for name in ("command", "product", "training", "steps", "share", "software")},
        "code": _code_version(root),
        "host": platform.platform(),
        "nodes": list(nodes),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(RECORDED)},
    }
    write_json(attempt / "record.json", content)


def progress_of(plan: Mapping[str, Any]) -> int:
    """How far a stage is, as a number that grows: the step of the newest checkpoint, or the finished parts of a store.

    For a task of an array only the parts of its own share count. A finished product adds one.
    """
    if plan["training"]:
        found = list_checkpoints(Path(plan["training"]) / "checkpoints")
        return int(found[-1].name.removeprefix("step-")) if found else 0
    product, (index, count) = Path(plan["product"]), plan.get("share", (0, 1))
    parts = [int(path.name.partition("-")[0]) for path in (product.parent / BUILDING).glob("*-*.json")]
    return sum(part % count == index for part in parts) + product.exists()


def _code_version(root: Path) -> str:
    """The commit, `+changes` if the files differ from it; empty without git."""
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def describe(run: Path) -> Iterator[str]:
    """Lines on every stage that has had a job, oldest first.

    Raises:
        UserError: if no job has run there.
    """
    folders = [path.parent for path in (run / "slurm").glob("*/journal.jsonl")]
    stages = [(journal, records) for records in map(StageRecords, folders) if (journal := records.journal())]
    if not stages:
        raise UserError(
            f"{run} holds no records of jobs: give the run folder of an experiment that a launcher has started."
        )
    for journal, records in sorted(stages, key=lambda stage: stage[0][0]["time"]):
        yield from _describe_stage(journal, records)


def _describe_stage(journal: list[dict[str, Any]], records: StageRecords) -> Iterator[str]:
    job, last = journal[-1]["job"], journal[-1]
    own = [event for event in journal if event["job"] == job]
    yield f"{records.folder.name}: {_state(job)}, job {job}"
    record = records.folder / "latest" / "record.json"
    if record.exists():
        yield from _describe_progress(read_json(record), own, job)
    failures = [event for event in own if event["event"] in FAILURES]
    if failures:
        yield f"    last error: {_error(failures[-1])}, {_ago(failures[-1]['time'])} ago"
    if last["event"] in ("over", "requeue"):
        yield f"    {last['reason']}"
    yield f"    logs: {records.folder / 'latest'}"


def _describe_progress(record: dict[str, Any], events: list[dict[str, Any]], job: str) -> Iterator[str]:
    step = progress_of(record)
    if record["training"] and (now := _last_step(Path(record["training"]) / "metrics.jsonl")):
        loss = "not finite" if now["loss"] is None else f"{now['loss']:.4f}"
        yield (
            f"    step {now['step']} of {record['steps']}, checkpoint {step}, loss {loss}, "
            f"{now['tokens_per_second']:,.0f} tokens/s"
        )
    restarts = max(0, sum(event["event"] == "start" for event in events) - 1)
    fruitless = max(0, attempts_without_progress(events, job, step) - 1)
    yield f"    restarts {restarts}, the last {fruitless} without progress"


def _state(job: str) -> str:
    try:
        known = slurm.fields("job", job)
    except slurm.SlurmError:
        return "Slurm does not answer"
    state = known.get("JobState", "no longer known to Slurm")
    return f"{state} on {known['NodeList']}" if state == "RUNNING" else state


def _last_step(metrics: Path) -> dict[str, Any] | None:
    """The last record of a training step."""
    return next((record for record in reversed(read_json_lines(metrics)) if record["kind"] == "train"), None)


def _error(event: dict[str, Any]) -> str:
    if event["event"] == "bad nodes":
        return "; ".join(f"{node}: {problem}" for node, problem in event["nodes"].items())
    if event["event"] == "no all-reduce":
        return f"no all-reduce among the nodes: {event['problem']}"
    return f"{event['who']} ended with code {event['code']}, {event['log']}"


def _ago(then: float) -> str:
    minutes = int((time.time() - then) / 60)
    return f"{minutes // 60}:{minutes % 60:02} h"


def main(arguments: Sequence[str]) -> None:
    """Print the state of a run."""
    parser = command.Parser(prog="status.sh", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder of an experiment")
    print("\n".join(describe(parser.parse_args(arguments).run)))


if __name__ == "__main__":
    raise SystemExit(command.guard(lambda: main(enter_work_folder(sys.argv[1:]))))
