"""What a job makes of Slurm's answers, and of silence. Scripts that say what Slurm's clients say stand in for them."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from calm_core.cluster.slurm import Job, SlurmError, fields, is_queued
from calm_core.cluster.steps import Steps
from calm_core.errors import UserError

SILENCE = 'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1'
JOB = Job(id="7", restart=0, nodes=("node1",), tasks_per_node=1, cpus_per_task=1, array=None)
Client = Callable[[str, str], Path]


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    """Makes a client of a name and a piece of shell; the file returned gets a line with the arguments of each call."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def make(name: str, script: str) -> Path:
        path, calls = tmp_path / name, tmp_path / f"{name}.calls"
        calls.touch()
        path.write_text(f"#!/bin/bash\ncalls={calls}; echo $@ >> $calls\n{script}\n")
        path.chmod(0o755)
        return calls

    return make


@pytest.fixture
def handlers() -> Iterator[None]:
    """Afterwards signals mean what they meant before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_client_that_gets_no_answer_is_started_again(client: Client) -> None:
    calls = client("scontrol", f"(( $(wc -l < $calls) > 1 )) || {{ {SILENCE}; }}; echo JobId=7 JobState=RUNNING A=b=c")
    assert fields("job", "7") == {"JobId": "7", "JobState": "RUNNING", "A": "b=c"}
    assert calls.read_text() == "show --oneliner job 7\n" * 2


@pytest.mark.parametrize("silence", [SILENCE, "exit 1", "exec sleep 60"])
def test_silence_is_no_answer(client: Client, silence: str) -> None:
    client("scontrol", silence)
    with pytest.raises(SlurmError, match="scontrol show --oneliner job 7: "):
        fields("job", "7", patience=0.1)


def test_an_unknown_job_is_an_answer(client: Client) -> None:
    scontrol = client("scontrol", "echo Job 7_9 not found; exit 1")
    squeue = client("squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    assert fields("job", "7_9") == {}
    assert not is_queued("7")
    assert len((scontrol.read_text() + squeue.read_text()).splitlines()) == 2


def test_an_array_is_queued_as_long_as_one_task_is(client: Client) -> None:
    client("squeue", "echo 7_4")
    assert is_queued("7")
    client("squeue", "exit 0")
    assert not is_queued("7")


def test_a_refusal_is_final(client: Client) -> None:
    calls = client("scontrol", 'echo "Requested operation is presently disabled for job 7" >&2; exit 1')
    with pytest.raises(SlurmError, match="presently disabled"):
        JOB.requeue()
    assert calls.read_text() == "requeue 7\n"


def test_nodes_are_excluded_while_enough_others_are_there(client: Client) -> None:
    shown = "echo JobId=7 Partition=batch ExcNodeList=node3"
    calls = client("scontrol", f"case $2 in hostnames) echo $3;; --oneliner) {shown};; esac")
    client("sinfo", "printf 'node%d\\n' 1 2 3")
    JOB.exclude(["node1"])
    assert calls.read_text().endswith("update JobId=7 ExcNodeList=node1,node3\n")
    with pytest.raises(SlurmError, match="0 others, and the job needs 1"):
        JOB.exclude(["node1", "node2"])


def test_the_address_is_the_name_where_slurm_says_none(client: Client) -> None:
    client("scontrol", "echo Node node1 not found; exit 1")
    assert JOB.address == "node1"


@pytest.mark.parametrize(("state", "code"), [("RUNNING", -signal.SIGUSR1), ("", -signal.SIGUSR1), ("CANCELLED", 0)])
def test_ranks_are_told_unless_slurm_ends_the_job_itself(
    monkeypatch: pytest.MonkeyPatch, handlers: None, state: str, code: int
) -> None:
    def answer(*command: str, patience: float = 0) -> str:
        if not state:
            raise SlurmError(" ".join(command))
        return f"JobState={state} EndTime=Unknown"

    monkeypatch.setattr("calm_core.cluster.slurm._ask", answer)
    steps, told = Steps(JOB, os.environ), []
    os.kill(os.getpid(), signal.SIGUSR1)
    assert steps.run(["sleep", "1"], lambda: told.append(1)) == code
    assert told == [1]


@pytest.mark.parametrize(
    ("first", "last", "count", "share"),
    [(0, 3, 4, (2, 4)), (1, 4, 4, (1, 4)), (0, 14, 8, None), (2, 5, 3, None)],
)
def test_the_share_of_a_task(client: Client, first: int, last: int, count: int, share: tuple[int, int] | None) -> None:
    client("scontrol", "echo node1")
    array = {"ID": 2, "MIN": first, "MAX": last, "COUNT": count}
    environment = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}
    job = Job.of(environment | {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()})
    assert job.id == "7_2"
    if share:
        assert job.share == share
    else:
        with pytest.raises(UserError, match=f"submit --array=0-{count - 1}"):
            _ = job.share


def test_a_job_that_is_no_array_has_all_of_the_work() -> None:
    assert JOB.share == (0, 1)
