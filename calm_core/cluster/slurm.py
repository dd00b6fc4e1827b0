"""What a job asks of Slurm: its own record, its nodes, being requeued."""

import re
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from calm_core.errors import UserError

LONG_WAIT = 600.0  # seconds for an answer that the job depends on: Slurm's controller may be restarting

SHORT_WAIT = 10.0  # seconds for an answer while ranks run or a person waits

UNKNOWN = re.compile(r"Invalid job id|(Job|Node) \S+ not found")

# Slurm understood the request and refuses it. After any other error it may answer later.
REFUSED = re.compile(
    "presently disabled|pending execution|already complet|permission denied|configuration is not available"
)

FIRST_PORT, PORTS = 20_000, 10_000  # below the ports that the system assigns automatically


class SlurmError(UserError):
    """Slurm refuses a request or does not answer, which says nothing about the state of a job."""


class UnknownError(SlurmError):
    """Slurm knows no such job or node."""


@dataclass(frozen=True)
class Job:
    """The job that this process belongs to.

    Attributes:
        id: of the job, or `ARRAY_TASK` for a task of an array, whose plain id may stand for the whole array.
        number: `SLURM_JOB_ID`, another one for each task of an array.
        restart: how often the job has been requeued.
        nodes: names of its nodes, in Slurm's order.
        tasks_per_node: ranks on each node.
        cpus_per_task: cores of each rank.
        array: (task, first task, last task, number of tasks) in an array, else None.
        environment: the variables to start ranks with: those of this process that describe this job.
    """

    id: str
    number: int
    restart: int
    nodes: tuple[str, ...]
    tasks_per_node: int
    cpus_per_task: int
    array: tuple[int, int, int, int] | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Job":
        """The job of a batch script with this environment.

        A job that is submitted from within another one inherits its variables, and Slurm replaces only those
        that the new job has too. What it may not have (array, restarts, GPUs) is therefore read from Slurm's record.

        Raises:
            SlurmError: if Slurm does not answer.
            UserError: if the nodes have different numbers of tasks.
        """
        number = environment["SLURM_JOB_ID"]
        record = _record(number)
        nodes = _expand(environment["SLURM_JOB_NODELIST"])
        array = _array(environment, record)
        return cls(
            id=f"{record['ArrayJobId']}_{record['ArrayTaskId']}" if array else number,
            number=int(number),
            restart=int(record.get("Restarts", "0")),
            nodes=nodes,
            tasks_per_node=_tasks_per_node(environment, len(nodes)),
            cpus_per_task=int(environment.get("SLURM_CPUS_PER_TASK", "1")),
            array=array,
            environment=_own_variables(environment, record),
        )

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.nodes) * self.tasks_per_node

    @property
    def share(self) -> tuple[int, int]:
        """This task's share of the work, counted from 0, and the number of shares; (0, 1) without an array.

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
        """The address of the first node that Slurm itself uses, since the node's name may not resolve."""
        try:
            return fields("node", self.nodes[0], LONG_WAIT)["NodeAddr"]
        except (SlurmError, KeyError):
            return self.nodes[0]

    def free_port(self) -> int:
        """A port of the first node, which this process runs on, for the ranks to connect to.

        Jobs and restarts begin their search at different ports, so that a port that is taken just after it was found
        free is not tried again by the next start.
        """
        first = self.number + 1009 * self.restart
        for port in (FIRST_PORT + (first + step) % PORTS for step in range(PORTS)):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("", port))
                except OSError:
                    continue
                return port
        raise SlurmError(f"no port of {self.nodes[0]} from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is free")

    def fields(self) -> dict[str, str]:
        """Slurm's record of this job; {} if it is no longer known.

        Raises:
            SlurmError: if there is no answer.
        """
        return fields("job", self.id)

    def lost_nodes(self) -> list[str]:
        """Nodes of this job that Slurm reports as down; [] without an answer."""
        try:
            names = _ask("sinfo", "-h", "-N", "-n", ",".join(self.nodes), "-t", "down,fail", "-o", "%N")
        except SlurmError:
            return []
        return sorted(set(names.split()))

    def requeue(self) -> None:
        """Put the job back into the queue. Slurm then ends this process.

        Raises:
            SlurmError: if Slurm does not allow it or does not answer.
        """
        _ask("scontrol", "requeue", self.id, wait=LONG_WAIT)

    def exclude(self, nodes: Iterable[str]) -> None:
        """Keep the next start off these nodes and those excluded before; possible just after `requeue`.

        Raises:
            SlurmError: if too few nodes would be left, so that the job would wait forever.
        """
        known = self.fields()
        before = known.get("ExcNodeList", "(null)")
        excluded = {*nodes, *(_expand(before) if before != "(null)" else ())}
        others = {*_ask("sinfo", "-h", "-N", "-p", known.get("Partition", ""), "-o", "%N").split()} - excluded
        if len(others) < len(self.nodes):
            raise SlurmError(f"there are {len(others)} others, and the job needs {len(self.nodes)}")
        _ask("scontrol", "update", f"JobId={self.id}", f"ExcNodeList={','.join(sorted(excluded))}", wait=LONG_WAIT)


def fields(kind: str, name: str, wait: float = SHORT_WAIT) -> dict[str, str]:
    """`scontrol show KIND NAME` by field; {} if Slurm does not know it. Values are cut at their first blank.

    Raises:
        SlurmError: if there is no answer.
    """
    try:
        return _fields(_ask("scontrol", "show", "--oneliner", kind, name, wait=wait).partition("\n")[0])
    except UnknownError:
        return {}


def is_queued(job: str) -> bool:
    """Whether a job, or any task of an array, is pending or running.

    Raises:
        SlurmError: if there is no answer.
    """
    try:
        return bool(_ask("squeue", "--noheader", "--jobs", job, "--format=%i"))
    except UnknownError:
        return False


def _record(number: str) -> dict[str, str]:
    """Slurm's record of the job whose SLURM_JOB_ID is `number`: for an array's id Slurm prints those of all tasks."""
    lines = _ask("scontrol", "show", "--oneliner", "job", number, wait=LONG_WAIT).splitlines()
    records = {record.get("JobId"): record for record in map(_fields, lines)}
    if number not in records:
        raise SlurmError(f"scontrol show job {number} shows no job of this number")
    return records[number]


def _fields(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _array(environment: Mapping[str, str], record: Mapping[str, str]) -> tuple[int, int, int, int] | None:
    if "ArrayTaskId" not in record:
        return None
    return tuple(int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "MAX", "COUNT"))


def _tasks_per_node(environment: Mapping[str, str], nodes: int) -> int:
    """Ranks on each node: `--ntasks` counts before the launcher's `--ntasks-per-node`, which is then only a limit."""
    per_node = int(environment.get("SLURM_NTASKS_PER_NODE", "1"))
    tasks = int(environment.get("SLURM_NTASKS", nodes * per_node))
    if tasks % nodes:
        raise UserError(f"{tasks} tasks do not divide evenly over {nodes} nodes: give --nodes and --ntasks-per-node.")
    return tasks // nodes


def _own_variables(environment: Mapping[str, str], record: Mapping[str, str]) -> dict[str, str]:
    """The environment without variables of another job, which this one was submitted from."""
    foreign = ["SLURM_RESTART_COUNT"] if record.get("Restarts", "0") == "0" else []
    if "ArrayTaskId" not in record:
        foreign += [name for name in environment if name.startswith("SLURM_ARRAY_")]
    if "gres/gpu" not in record.get("TRES", "gres/gpu"):
        foreign += ["SLURM_GPUS_ON_NODE"]
    return {name: value for name, value in environment.items() if name not in foreign}


def _expand(nodes: str) -> tuple[str, ...]:
    """The names that Slurm abbreviates, as in `node[1-3]`."""
    return tuple(_ask("scontrol", "show", "hostnames", nodes).split())


def _ask(*command: str, wait: float = SHORT_WAIT) -> str:
    """What one of Slurm's commands prints. Without an answer it is run again at growing intervals for `wait` seconds.

    Raises:
        UnknownError: if Slurm knows no such thing.
        SlurmError: if it refuses or does not answer, in its words.
    """
    end, pause = time.monotonic() + wait, 0.5
    while True:
        code, answer = _run(command, max(1.0, end - time.monotonic()))
        if code == 0:
            return answer
        message = f"{' '.join(command)}: {answer.strip()}"
        if UNKNOWN.search(answer):
            raise UnknownError(message)
        if REFUSED.search(answer) or time.monotonic() + pause > end:
            raise SlurmError(message)
        time.sleep(pause)
        pause = min(2 * pause, 15.0)


def _run(command: tuple[str, ...], seconds: float) -> tuple[int, str]:
    """The exit code of a command and its output, with its error output if it fails; it may take `seconds`."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return 1, "no answer"
    except FileNotFoundError as error:
        raise SlurmError(missing_command(command[0])) from error
    return result.returncode, result.stdout + (result.stderr if result.returncode else "")


def missing_command(name: str) -> str:
    """The sentence for a machine without Slurm."""
    return f"There is no {name} on this machine: call this where Slurm's commands are, such as on a login node."
