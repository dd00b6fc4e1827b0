"""What happened to a training run: restarts, faults, hangs, and what its jobs on a cluster recorded."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from calm_core.io import read_json_lines
from calm_core.report.page import number
from calm_core.training.stopping import hangs

Record = Mapping[str, Any]

# The fields of an event that are shown elsewhere on the page.
ENVELOPE = {"step", "kind", "event", "time", "stages", "parameters", "hardware", "commit"}


class Incident(NamedTuple):
    """An event of a run: its time (seconds since 1970, 0 if unknown), step, name, and details."""

    time: float
    step: Any
    what: str
    details: str


def incidents(run: Path, events: Sequence[Record]) -> list[Incident]:
    """All that happened to the run in the folder `run`, in order; `events` are those of its metrics.jsonl."""
    return sorted([*_recorded(events), *_hung(run), *_of_jobs(run)], key=lambda incident: incident.time)


def shown_time(time: float) -> str:
    """A time in UTC; nothing where it is unknown."""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S") if time else ""


def _recorded(events: Sequence[Record]) -> Iterator[Incident]:
    """What the run itself has recorded; a start after a run that did not record its end follows a crash."""
    last = ""
    for event in events:
        what = event["event"]
        if what == "start" and last:
            what = "restart" if last in ("stopped", "finished") else "restart after a crash"
        if what not in ("start", "checkpoint", "finished"):
            yield Incident(event.get("time", 0.0), event["step"], what, _details(event))
        if event["event"] in ("start", "stopped", "finished", "failed"):
            last = event["event"]


def _hung(run: Path) -> Iterator[Incident]:
    for time, title in hangs(run / "logs"):
        yield Incident(time, "", "ended by the watchdog", title)


def _of_jobs(run: Path) -> Iterator[Incident]:
    """What the jobs of the experiment on a cluster recorded: those of the autoencoder's stages, or all others."""
    for journal in sorted((run.parent / "slurm").glob("*/journal.jsonl")):
        stage = journal.parent.name
        if ("autoencoder" in stage) != (run.name == "autoencoder"):
            continue
        trained = stage.startswith(f"train_{run.name}")  # other stages count other things
        for event in read_json_lines(journal):
            step = event.get("step", "") if trained else ""
            yield Incident(event["time"], step, f"{stage}: {event['event']}", _details(event))


def _details(record: Record) -> str:
    return ", ".join(f"{key}: {number(value)}" for key, value in record.items() if key not in ENVELOPE)
