"""The few words that a job exchanges with Slurm."""

import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from calm_core.errors import UserError

PATIENCE = 600.0  # seconds that Slurm may take to answer where the job depends on it: its controller may be restarting

HASTE = 10.0  # the same where ranks or a person wait

UNKNOWN = re.compile(r"Invalid job id|(Job|Node) \S+ not found")

# What Slurm says when it has understood and will not. Whatever else goes wrong, it may answer another time.
REFUSED = re.compile(
    "presently disabled|pending execution|already complet|permission denied|configuration is not available"
)


class SlurmError(UserError):
    """Slurm refuses what it is asked for, or gives no answer: that says nothing of the state of a job."""


class UnknownError(SlurmError):
    """Slurm knows no such job or node."""


@dataclass(frozen=True)
class Job:
    """The job that this process belongs to.

    Attributes:
        id: of the job, or `ARRAY_TASK` for a task of an array: its plain id may stand for the whole array.
        restart: times that it has been requeued.
        nodes: names of its nodes, in Slurm's order.
        tasks_per_node: ranks on each.
        cpus_per_task: cores of each rank.
        array: (task, first task, last task, number of tasks) in an array, else None.
    """

    id: str
    restart: int
    nodes: tuple[str, ...]
    tasks_per_node: int
    cpus_per_task: int
    array: tuple[int, int, int, int] | None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Job":
        """The job that these variables of Slurm describe.

        Raises:
            SlurmError: if its nodes cannot be told.
        """
        array = None
        job = environment["SLURM_JOB_ID"]
        if "SLURM_ARRAY_TASK_ID" in environment:
            array = tuple(int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "MAX", "COUNT"))
            job = f"{environment['SLURM_ARRAY_JOB_ID']}_{array[0]}"
        return cls(
            id=job,
            restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
            nodes=_names(environment["SLURM_JOB_NODELIST"]),
            tasks_per_node=int(environment.get("SLURM_NTASKS_PER_NODE", "1")),
            cpus_per_task=int(environment.get("SLURM_CPUS_PER_TASK", "1")),
            array=array,
        )

    @property
    def world(self) -> int:
        """Ranks in all."""
        return len(self.nodes) * self.tasks_per_node

    @property
    def share(self) -> tuple[int, int]:
        """Which share of the work is this task's, counted from 0, and of how many; (0, 1) without an array.

        Raises:
            UserError: if the array has gaps: Slurm does not tell a task how many others come before it.
        """
        if self.array is None:
            return 0, 1
        task, first, last, count = self.array
        if last - first + 1 != count:
            raise UserError(
                f"An array of {count} tasks from {first} to {last} has gaps, and its tasks cannot know their shares: "
                f"submit --array=0-{count - 1}, whose tasks share what is not done yet."
            )
        return task - first, count

    @cached_property
    def address(self) -> str:
        """Where the first node is reached: the address that Slurm itself uses, for its name may not resolve."""
        try:
            return fields("node", self.nodes[0], PATIENCE)["NodeAddr"]
        except (SlurmError, KeyError):
            return self.nodes[0]

    @property
    def port(self) -> int:
        """A port for the ranks to meet at: another one for each job, below those that the system hands out."""
        return 20_000 + int(os.environ["SLURM_JOB_ID"]) % 10_000

    def fields(self) -> dict[str, str]:
        """What Slurm says of this job; {} if it does not know it any more.

        Raises:
            SlurmError: if there is no answer.
        """
        return fields("job", self.id)

    def lost_nodes(self) -> list[str]:
        """Nodes of this job that Slurm has given up, as far as it says so."""
        try:
            names = _ask("sinfo", "-h", "-N", "-n", ",".join(self.nodes), "-t", "down,fail", "-o", "%N")
        except SlurmError:
            return []
        return sorted(set(names.split()))

    def requeue(self) -> None:
        """Put the job back into the queue. Slurm then ends this process.

        Raises:
            SlurmError: if Slurm does not allow it, or gives no answer.
        """
        _ask("scontrol", "requeue", self.id, patience=PATIENCE)

    def exclude(self, nodes: Iterable[str]) -> None:
        """Keep the next start from these nodes, besides those excluded already; possible just after `requeue`.

        Raises:
            SlurmError: if that would leave too few nodes, and the job in the queue for ever.
        """
        known = self.fields()
        before = known.get("ExcNodeList", "(null)")
        without = {*nodes, *(_names(before) if before != "(null)" else ())}
        others = {*_ask("sinfo", "-h", "-N", "-p", known.get("Partition", ""), "-o", "%N").split()} - without
        if len(others) < len(self.nodes):
            raise SlurmError(f"there are {len(others)} others, and the job needs {len(self.nodes)}")
        _ask("scontrol", "update", f"JobId={self.id}", f"ExcNodeList={','.join(sorted(without))}", patience=PATIENCE)


def fields(kind: str, name: str, patience: float = HASTE) -> dict[str, str]:
    """`scontrol show KIND NAME` by field; {} if Slurm does not know it. Values with blanks are cut at the first.

    Raises:
        SlurmError: if there is no answer.
    """
    try:
        first = _ask("scontrol", "show", "--oneliner", kind, name, patience=patience).partition("\n")[0]
    except UnknownError:
        return {}
    return dict(word.split("=", 1) for word in first.split() if "=" in word)


def is_queued(job: str) -> bool:
    """Whether a job, or any task of an array, waits or runs.

    Raises:
        SlurmError: if there is no answer.
    """
    try:
        return bool(_ask("squeue", "--noheader", "--jobs", job, "--format=%i"))
    except UnknownError:
        return False


def _names(nodes: str) -> tuple[str, ...]:
    """The names that Slurm abbreviates, as in `node[1-3]`."""
    return tuple(_ask("scontrol", "show", "hostnames", nodes).split())


def _ask(*command: str, patience: float = HASTE) -> str:
    """What a client of Slurm prints. One that gets no answer is started again, ever later, for `patience` seconds.

    Raises:
        UnknownError: if Slurm knows no such thing.
        SlurmError: if it refuses, or does not answer; in its words.
    """
    end, pause = time.monotonic() + patience, 0.5
    while True:
        code, words = _once(command, max(1.0, end - time.monotonic()))
        if code == 0:
            return words
        said = f"{' '.join(command)}: {words.strip()}"
        if UNKNOWN.search(words):
            raise UnknownError(said)
        if REFUSED.search(words) or time.monotonic() + pause > end:
            raise SlurmError(said)
        time.sleep(pause)
        pause = min(2 * pause, 15.0)


def _once(command: tuple[str, ...], seconds: float) -> tuple[int, str]:
    """The exit code of a client and what it prints, with its errors if it fails; a client waits long for an answer."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return 1, "no answer"
    return result.returncode, result.stdout + (result.stderr if result.returncode else "")
