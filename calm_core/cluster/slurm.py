"""The few words that a job exchanges with Slurm."""

import os
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """The job that this process belongs to.

    Attributes:
        id: of the job, or `ARRAY_TASK` for a task of an array: its plain id may stand for the whole array.
        restart: times that it has been requeued.
        nodes: names of its nodes, in Slurm's order.
        tasks_per_node: ranks on each.
        cpus_per_task: cores of each rank.
        array: (task, first task, number of tasks) in an array, else None.
    """

    id: str
    restart: int
    nodes: tuple[str, ...]
    tasks_per_node: int
    cpus_per_task: int
    array: tuple[int, int, int] | None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Job":
        """The job that these variables of Slurm describe."""
        array = None
        job = environment["SLURM_JOB_ID"]
        if "SLURM_ARRAY_TASK_ID" in environment:
            names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")
            task, first, count = (int(environment[name]) for name in names)
            job, array = f"{environment['SLURM_ARRAY_JOB_ID']}_{task}", (task, first, count)
        return cls(
            id=job,
            restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
            nodes=tuple(_ask("scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]).split()),
            tasks_per_node=int(environment.get("SLURM_NTASKS_PER_NODE", "1")),
            cpus_per_task=int(environment.get("SLURM_CPUS_PER_TASK", "1")),
            array=array,
        )

    @property
    def world(self) -> int:
        """Ranks in all."""
        return len(self.nodes) * self.tasks_per_node

    @property
    def address(self) -> str:
        """Where the first node is reached: the address that Slurm itself uses, for its name may not resolve."""
        return fields("node", self.nodes[0])["NodeAddr"]

    @property
    def port(self) -> int:
        """A port for the ranks to meet at: another one for each job, below those that the system hands out."""
        return 20_000 + int(os.environ["SLURM_JOB_ID"]) % 10_000

    def fields(self) -> dict[str, str]:
        """What Slurm says of this job."""
        return fields("job", self.id)

    def lost_nodes(self) -> list[str]:
        """Nodes of this job that Slurm has given up."""
        names = _ask("sinfo", "-h", "-N", "-n", ",".join(self.nodes), "-t", "down,fail", "-o", "%N").split()
        return sorted(set(names))

    def requeue(self) -> None:
        """Put the job back into the queue. Slurm then ends this process.

        Raises:
            subprocess.CalledProcessError: if Slurm does not allow it.
        """
        _ask("scontrol", "requeue", self.id)

    def exclude(self, nodes: Iterable[str]) -> None:
        """Keep the next start from these nodes, besides those excluded already; possible just after `requeue`.

        Raises:
            subprocess.CalledProcessError: if Slurm has too few others.
        """
        before = self.fields().get("ExcNodeList", "(null)")
        names = ",".join([*nodes, *([before] if before != "(null)" else [])])
        _ask("scontrol", "update", f"JobId={self.id}", f"ExcNodeList={names}")


def fields(kind: str, name: str) -> dict[str, str]:
    """`scontrol show KIND NAME` by field; {} if Slurm does not know it. Values with blanks are cut at the first."""
    try:
        first = _ask("scontrol", "show", "--oneliner", kind, name).partition("\n")[0]
    except subprocess.CalledProcessError:
        return {}
    return dict(word.split("=", 1) for word in first.split() if "=" in word)


def _ask(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
