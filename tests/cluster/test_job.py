import pytest

from calm_core.cluster.job import bad_nodes, decide, network_error
from calm_core.errors import ExitCode

SOUND = {"problems": [], "network_error": "", "unreached": []}


@pytest.mark.parametrize(
    ("code", "end_requested", "fruitless", "requeued"),
    [
        (ExitCode.OK, False, 1, False),
        (ExitCode.OK, True, 1, False),  # finished before the time limit
        (ExitCode.USAGE, False, 1, False),
        (ExitCode.USAGE, True, 1, False),
        (ExitCode.STOPPED, True, 9, True),  # preempted again and again, which is not a failure
        (ExitCode.STOPPED, False, 1, False),
        (-9, True, 9, True),  # killed at the time limit while it saved
        (ExitCode.FAILED, False, 1, True),
        (ExitCode.FAILED, False, 3, True),
        (ExitCode.FAILED, False, 4, False),
        (ExitCode.WATCHDOG, False, 1, True),
        (ExitCode.WATCHDOG, False, 4, False),
        (-9, False, 1, True),
        (-9, False, 4, False),
    ],
)
def test_what_becomes_of_a_job(code: int, end_requested: bool, fruitless: int, requeued: bool) -> None:
    assert decide(code, end_requested, fruitless, limit=3).requeue == requeued


def test_no_node_is_excluded_for_the_fault_of_another() -> None:
    nodes = ("a", "b", "c")
    alone = SOUND | {"network_error": "timed out"}
    assert bad_nodes(nodes, dict.fromkeys(nodes, SOUND)) == {}
    assert bad_nodes(nodes, {"a": alone, "b": alone}) == {"c": "no answer"}
    assert bad_nodes(nodes, {"a": alone, "b": alone, "c": alone | {"problems": ["x", "y"]}}) == {"c": "x; y"}
    assert list(bad_nodes(nodes, {"a": alone | {"unreached": ["b"]}, "b": alone, "c": alone})) == ["b"]
    assert list(bad_nodes(nodes, {"a": alone | {"unreached": ["b", "c"]}, "b": alone, "c": alone})) == ["a"]
    assert bad_nodes(nodes[:1], {"a": alone | {"problems": ["x"]}}) == {"a": "x"}


def test_no_node_is_excluded_when_the_all_reduce_fails_among_sound_nodes() -> None:
    reports = {"a": SOUND, "b": SOUND | {"network_error": "timed out"}}
    assert bad_nodes(("a", "b"), reports) == {}
    assert network_error(reports) == "timed out"
    assert network_error({"a": SOUND, "b": SOUND}) == ""
