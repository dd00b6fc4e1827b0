"""How a job reads Slurm's answers, and no answer. Scripts that print what Slurm's commands print stand in for them."""

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from calm_core.cluster.slurm import Job, SlurmError, fields, is_queued
from calm_core.errors import UserError

SILENCE = 'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1'
JOB = Job(id="7", number=7, restart=0, nodes=("node1",), tasks_per_node=1, cpus_per_task=1)
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


def test_a_client_that_gets_no_answer_is_started_again(client: Client) -> None:
    calls = client("scontrol", f"(( $(wc -l < $calls) > 1 )) || {{ {SILENCE}; }}; echo JobId=7 JobState=RUNNING A=b=c")
    assert fields("job", "7") == {"JobId": "7", "JobState": "RUNNING", "A": "b=c"}
    assert calls.read_text() == "show --oneliner job 7\n" * 2


@pytest.mark.parametrize("silence", [SILENCE, "exit 1", "exec sleep 60"])
def test_silence_is_no_answer(client: Client, silence: str) -> None:
    client("scontrol", silence)
    with pytest.raises(SlurmError, match="scontrol show --oneliner job 7: "):
        fields("job", "7", wait=0.1)


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


ENVIRONMENT = {"SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "node1"}


def array(task: int, first: int, last: int, count: int) -> dict[str, str]:
    values = {"ID": task, "MIN": first, "MAX": last, "COUNT": count}
    return {"SLURM_ARRAY_JOB_ID": "7"} | {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def scontrol(record: str, nodes: int = 1) -> str:
    names = " ".join(f"node{number}" for number in range(1, nodes + 1))
    return f"case $2 in hostnames) echo {names};; *) echo JobId=8 ArrayJobId=7 ArrayTaskId=1; echo {record};; esac"


@pytest.mark.parametrize(
    ("first", "last", "count", "share"),
    [(0, 3, 4, (2, 4)), (1, 4, 4, (1, 4)), (0, 14, 8, None), (2, 5, 3, None)],
)
def test_the_share_of_a_task(client: Client, first: int, last: int, count: int, share: tuple[int, int] | None) -> None:
    client("scontrol", scontrol("JobId=9 ArrayJobId=7 ArrayTaskId=2"))
    job = Job.of(ENVIRONMENT | array(2, first, last, count))
    assert job.id == "7_2"
    if share:
        assert job.share == share
    else:
        with pytest.raises(UserError, match=f"submit --array=0-{count - 1}"):
            _ = job.share


def test_variables_of_the_job_it_was_submitted_from_are_not_its_own(client: Client) -> None:
    client("scontrol", scontrol("JobId=9 Restarts=0 TRES=cpu=1,node=1"))
    outer = array(2, 0, 3, 4) | {"SLURM_RESTART_COUNT": "5", "SLURM_GPUS_ON_NODE": "8", "HOME": "/root"}
    job = Job.of(ENVIRONMENT | outer)
    assert (job.id, job.array, job.share, job.restart) == ("9", None, (0, 1), 0)
    assert job.environment == ENVIRONMENT | {"HOME": "/root"}


def test_restarts_and_gpus_of_its_own_are_kept(client: Client) -> None:
    client("scontrol", scontrol("JobId=9 Restarts=2 TRES=cpu=1,gres/gpu=8"))
    own = ENVIRONMENT | {"SLURM_RESTART_COUNT": "2", "SLURM_GPUS_ON_NODE": "8"}
    job = Job.of(own)
    assert (job.restart, job.environment) == (2, own)


def test_ntasks_counts_before_tasks_per_node(client: Client) -> None:
    client("scontrol", scontrol("JobId=9", nodes=2))
    of = ENVIRONMENT | {"SLURM_NTASKS_PER_NODE": "8"}
    assert Job.of(of).tasks_per_node == 8
    assert Job.of(of | {"SLURM_NTASKS": "4"}).tasks_per_node == 2
    with pytest.raises(UserError, match="3 tasks do not divide evenly over 2 nodes"):
        Job.of(of | {"SLURM_NTASKS": "3"})


def test_a_port_that_is_taken_is_passed_over_and_a_restart_begins_at_another() -> None:
    first = JOB.free_port()
    assert first == JOB.free_port()
    assert replace(JOB, restart=1).free_port() != first
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        taken.listen()
        assert JOB.free_port() not in (first, replace(JOB, restart=1).free_port())


def test_without_slurm_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="There is no squeue on this machine"):
        is_queued("7")


def test_a_job_that_is_no_array_has_all_of_the_work() -> None:
    assert JOB.share == (0, 1)
