"""The state of a run on a cluster, for a person: `launchers/status.sh RUN`."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from calm_core import command
from calm_core.cluster import slurm
from calm_core.cluster.jobfile import enter_work_folder
from calm_core.cluster.policy import fruitless_attempts
from calm_core.cluster.records import StageRecords, progress_of
from calm_core.data.manifest import read_json
from calm_core.errors import UserError

FAILURES = ("failure", "bad nodes", "no all-reduce")


def describe(run: Path) -> Iterator[str]:
    """Lines on every stage that has had a job, oldest first.

    Raises:
        UserError: if no job has run there.
    """
    journals = sorted(
        (run / "slurm").glob("*/journal.jsonl"), key=lambda path: json.loads(path.open().readline())["time"]
    )
    if not journals:
        raise UserError(
            f"{run} holds no records of jobs: give the run folder of an experiment that a launcher has started."
        )
    for path in journals:
        yield from _describe_stage(StageRecords(path.parent))


def _describe_stage(records: StageRecords) -> Iterator[str]:
    journal = records.journal()
    job, last = journal[-1]["job"], journal[-1]
    starts = [event for event in journal if event["event"] == "start" and event["job"] == job]
    yield f"{records.folder.name}: {_state(job)}, job {job}"
    record = records.folder / "latest" / "record.json"
    if record.exists():
        yield from _describe_training(read_json(record), starts, job, journal)
    failures = [event for event in journal if event["event"] in FAILURES and event["job"] == job]
    if failures:
        yield f"    last error: {_error(failures[-1])}, {_ago(failures[-1]['time'])} ago"
    if last["event"] in ("over", "requeue"):
        yield f"    {last['reason']}"
    yield f"    logs: {records.folder / 'latest'}"


def _describe_training(
    record: dict[str, Any], starts: list[dict[str, Any]], job: str, journal: list[dict[str, Any]]
) -> Iterator[str]:
    step = progress_of(record)
    fruitless = max(0, fruitless_attempts(journal, job, step) - 1)
    restarts = f"restarts {len(starts) - 1 if starts else 0}, the last {fruitless} without progress"
    if not record["training"]:
        yield f"    {restarts}"
        return
    if now := _last_step(Path(record["training"]) / "metrics.jsonl"):
        loss = "not finite" if now["loss"] is None else f"{now['loss']:.4f}"
        yield (
            f"    step {now['step']} of {record['steps']}, checkpoint {step}, loss {loss}, "
            f"{now['tokens_per_second']:,.0f} tokens/s"
        )
    yield f"    {restarts}"


def _state(job: str) -> str:
    try:
        known = slurm.fields("job", job)
    except slurm.SlurmError:
        return "Slurm does not answer"
    state = known.get("JobState", "no longer known to Slurm")
    return f"{state} on {known['NodeList']}" if state == "RUNNING" else state


def _last_step(metrics: Path) -> dict[str, Any] | None:
    """The last record of a training step; `training.run_log` reads them too, but with torch."""
    for line in reversed(metrics.read_text().splitlines() if metrics.exists() else ()):
        with suppress(ValueError):  # a line cut short by a crash
            if (record := json.loads(line))["kind"] == "train":
                return record
    return None


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
