import pytest

from calm_core.cluster.policy import bad_nodes, decide, first_failure, fruitless_attempts, unmet
from calm_core.errors import ExitCode

SOUND = {"problems": [], "apart": "", "absent": []}


@pytest.mark.parametrize(
    ("code", "asked", "fruitless", "again"),
    [
        (ExitCode.OK, False, 1, False),
        (ExitCode.OK, True, 1, False),  # it was done before the time limit came
        (ExitCode.USAGE, False, 1, False),
        (ExitCode.USAGE, True, 1, False),
        (ExitCode.STOPPED, True, 9, True),  # preempted without end, it still is nobody's fault
        (ExitCode.STOPPED, False, 1, False),
        (-9, True, 9, True),  # killed while it saved, the time was up
        (ExitCode.FAILED, False, 1, True),
        (ExitCode.FAILED, False, 3, True),
        (ExitCode.FAILED, False, 4, False),
        (ExitCode.WATCHDOG, False, 1, True),
        (ExitCode.WATCHDOG, False, 4, False),
        (-9, False, 1, True),
        (-9, False, 4, False),
    ],
)
def test_what_becomes_of_a_job(code: int, asked: bool, fruitless: int, again: bool) -> None:
    assert decide(code, asked, fruitless, limit=3).again == again


def start(step: int, job: str = "7") -> dict:
    return {"job": job, "event": "start", "step": step}


def end(asked: bool, job: str = "7") -> dict:
    return {"job": job, "event": "asked" if asked else "end"}


@pytest.mark.parametrize(
    ("journal", "count"),
    [
        ([], 0),
        ([start(5)], 1),
        ([start(5), start(5), end(False), start(5)], 3),  # the first was lost with its node
        ([start(0), end(False), start(5), end(False)], 1),  # progress between them
        ([start(5), end(False), start(5), end(True), start(5)], 1),  # Slurm's wish is no failure
        ([start(5), end(True)], 0),
        ([start(5, "6"), end(False, "6"), start(5)], 1),  # submitted anew by a person
        ([start(4), end(False)], 0),  # the attempt has made progress itself
    ],
)
def test_attempts_without_progress(journal: list[dict], count: int) -> None:
    assert fruitless_attempts(journal, "7", step=5) == count


def test_the_first_failure_is_the_cause() -> None:
    records = [
        {"rank": 0, "code": 1, "time": 3.0},
        {"rank": 1, "code": -9, "time": 2.0},
        {"rank": 2, "code": 75, "time": 1.0},
        {"rank": 3, "code": 0, "time": 0.0},
    ]
    assert first_failure(records)["rank"] == 1
    assert first_failure(records[2:]) is None


def test_no_node_is_blamed_for_the_fault_of_another() -> None:
    nodes = ("a", "b", "c")
    alone = SOUND | {"apart": "timed out"}
    assert bad_nodes(nodes, dict.fromkeys(nodes, SOUND)) == {}
    assert bad_nodes(nodes, {"a": alone, "b": alone}) == {"c": "no answer"}
    assert bad_nodes(nodes, {"a": alone, "b": alone, "c": alone | {"problems": ["x", "y"]}}) == {"c": "x; y"}
    assert list(bad_nodes(nodes, {"a": alone | {"absent": ["b"]}, "b": alone, "c": alone})) == ["b"]
    assert list(bad_nodes(nodes, {"a": alone | {"absent": ["b", "c"]}, "b": alone, "c": alone})) == ["a"]
    assert bad_nodes(nodes[:1], {"a": alone | {"problems": ["x"]}}) == {"a": "x"}


def test_an_all_reduce_that_fails_among_sound_nodes_names_none() -> None:
    verdicts = {"a": SOUND, "b": SOUND | {"apart": "timed out"}}
    assert bad_nodes(("a", "b"), verdicts) == {}
    assert unmet(verdicts) == "timed out"
    assert unmet({"a": SOUND, "b": SOUND}) == ""
