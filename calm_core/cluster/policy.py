"""What becomes of a job when its processes have ended: done, again, or left to a person."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calm_core.errors import ExitCode


@dataclass(frozen=True)
class Verdict:
    """Whether the job goes back into the queue, and why."""

    again: bool
    reason: str


def decide(code: int, asked: bool, fruitless: int, limit: int) -> Verdict:
    """The verdict on an attempt.

    Args:
        code: exit code of the process that failed first, negative if a signal killed it; 0 or 75 if none failed.
        asked: whether Slurm had asked for the end (time limit, preemption).
        fruitless: attempts of this job in a row, this one included, that began at the step where it still is.
        limit: restarts without progress that are allowed.
    """
    if code == ExitCode.OK:
        return Verdict(False, "finished")
    if code == ExitCode.USAGE:
        return Verdict(False, "a configuration error: a restart would fail alike; mend it and submit again")
    if asked:
        return Verdict(True, "Slurm needed the nodes; it goes on from the checkpoint")
    if code == ExitCode.STOPPED:
        return Verdict(False, "stopped by a person, checkpoint saved; submit again to go on")
    if fruitless > limit:
        return Verdict(False, f"{limit} restarts without progress: look at the cause and submit again")
    return Verdict(True, f"restart {fruitless} of {limit} without progress" if fruitless else "it has made progress")


def fruitless_attempts(journal: Sequence[Mapping[str, Any]], job: str, step: int) -> int:
    """Attempts of a job in a row, back from the last one, that began at `step` and that Slurm did not ask to end.

    An attempt without an end was cut off together with its node: it counts.
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


def first_failure(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Of how the ranks ended, the earliest failure: it is the cause, the rest followed."""
    failures = [record for record in records if record["code"] not in (ExitCode.OK, ExitCode.STOPPED)]
    return min(failures, key=lambda record: record["time"], default=None)


def bad_nodes(nodes: Sequence[str], verdicts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The nodes that training must not have, and why, by what each found of itself and by who came to meet the others.

    One node that fails keeps all from meeting: none is blamed for that while another has a fault of its own, and an
    all-reduce that fails among nodes that have all come blames none.
    """
    bad = {node: "no answer" for node in nodes if node not in verdicts}
    bad |= {node: "; ".join(v["problems"]) for node, v in verdicts.items() if v["problems"]}
    if bad:
        return bad
    absent = [node for verdict in verdicts.values() for node in verdict["absent"]]
    blamed = nodes[:1] if len(absent) == len(nodes) - 1 > 1 else absent
    return dict.fromkeys(blamed, "not reached by the others")


def unmet(verdicts: Mapping[str, Mapping[str, Any]]) -> str:
    """What went wrong in the all-reduce among the nodes, in the words of one of them; '' if nothing did."""
    return next((verdict["apart"] for verdict in verdicts.values() if verdict["apart"]), "")
