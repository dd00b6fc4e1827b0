import os
import signal
from collections.abc import Iterator

import pytest

from calm_core.cluster.slurm import Job, SlurmError
from calm_core.cluster.steps import Steps, rank_variables

JOB = Job(id="7", number=7, restart=0, nodes=("node1", "node2"), tasks_per_node=4, cpus_per_task=3)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Afterwards signals mean what they meant before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("state", "code"), [("RUNNING", -signal.SIGUSR1), ("", -signal.SIGUSR1), ("CANCELLED", 0)])
def test_ranks_are_signalled_unless_slurm_ends_the_job_itself(
    monkeypatch: pytest.MonkeyPatch, handlers: None, state: str, code: int
) -> None:
    def answer(*command: str, wait: float = 0) -> str:
        if not state:
            raise SlurmError(" ".join(command))
        return f"JobState={state} EndTime=Unknown"

    monkeypatch.setattr("calm_core.cluster.slurm._ask", answer)
    steps, calls = Steps(JOB, os.environ), []
    os.kill(os.getpid(), signal.SIGUSR1)
    assert steps.run(["sleep", "1"], lambda: calls.append(1), {}) == code
    assert calls == [1]


def test_a_step_gets_what_the_launcher_exports_whatever_sbatch_exported() -> None:
    command = Steps(JOB, {"EXTRA_SRUN_ARGS": "--mpi=none", "CALM_PYTHON": "py"}).command(4, ["-l"], "m", "a")
    size = ["--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=3"]
    assert command == ["srun", "--export=ALL", *size, "-l", "--mpi=none", "py", "-m", "m", "a"]


@pytest.mark.parametrize(
    ("gpus", "visible", "local"),
    [("8", "0,1,2,3,4,5,6,7", "3"), ("8", "3", "0"), ("8", "6,7", "0"), ("1", "0", "3"), (None, None, "3")],
)
def test_a_task_that_sees_only_its_own_gpus_has_the_first_of_them(
    gpus: str | None, visible: str | None, local: str
) -> None:
    slurm = {"SLURM_NTASKS": "16", "SLURM_PROCID": "11", "SLURM_LOCALID": "3"}
    if gpus:
        slurm |= {"SLURM_GPUS_ON_NODE": gpus, "CUDA_VISIBLE_DEVICES": visible}
    assert rank_variables(slurm) == {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": local}
    assert rank_variables(slurm | {"SLURM_NTASKS": "1"}) == {}
