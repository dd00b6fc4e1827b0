"""A throw-away Slurm cluster on this machine: real daemons, several nodes, everything below one folder.

It needs root and the packages of `PACKAGES`, and neither systemd nor cgroups nor GPUs. All nodes are this host, each
with a port of its own (Slurm's "multiple slurmd"), and claim more cores than there are. No limit is enforced. Several
clusters can run at once: their ports differ, and so do the numbers of their jobs, on which the jobs' own ports depend.
A second process removes everything when the one that uses the cluster ends, however it ends.
"""

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp

import psutil

PACKAGES = "munge slurmctld slurmd slurm-client"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
# A requeued job becomes eligible two minutes later. Told to start before Slurm has cleaned up, it fails.
SETTLE_SECONDS = 2.5

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1
FirstJobId={port}
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
SlurmctldTimeout=60
SlurmdTimeout=300
MessageTimeout=30
KillWait={kill_wait}
CompleteWait=0
InactiveLimit=0
MinJobAge=3600
JobRequeue=1
ReturnToService=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=30 PriorityTier=10 PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=30 PriorityTier=100 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install -y --no-install-recommends {PACKAGES}"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root"


class Cluster:
    """A running cluster of nodes `node1`, `node2`, ...; a context manager.

    Attributes:
        nodes: their names.
        environment: what a client of the cluster needs.
    """

    def __init__(self, nodes: int, cpus: int = 8, kill_wait: int = 30) -> None:
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self._root = Path(mkdtemp(prefix="calm-slurm-", dir="/tmp"))  # short: the path of a socket in it is limited
        guard = [sys.executable, __file__, str(self._root)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)
        self.environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(self._root / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen] = {}
        self._pending_since: dict[str, float] = {}
        (self._root / "log").mkdir()
        ports = _free_ports(nodes + 1)
        lines = [
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} "
            "RealMemory=64000 State=UNKNOWN"
            for name, port in zip(self.nodes, ports[1:], strict=True)
        ]
        conf = CONF.format(host=socket.gethostname(), port=ports[0], root=self._root, kill_wait=kill_wait)
        (self._root / "slurm.conf").write_text("\n".join([conf, *lines, ""]))
        # slurmd loads a cgroup plugin even if nothing uses it; this one starts where there are no cgroups.
        (self._root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(Exception):
            self.clear()
        for name in reversed(self._daemons):
            _end(self._daemons[name])
        self._guard.stdin.close()
        self._guard.wait()

    def run(self, *command: object, check: bool = True) -> str:
        """The output of a client's command; on a busy machine it may fail for a while."""
        words = list(map(str, command))
        for _ in range(5):
            result = subprocess.run(
                words, env=self.environment, capture_output=True, text=True, timeout=100, check=False
            )
            if result.returncode == 0 or not check:
                return result.stdout
            time.sleep(2)
        raise AssertionError(f"{command}: {result.stdout}{result.stderr}")

    def submit(self, *arguments: object, folder: Path, **environment: str) -> str:
        """Submit a batch job from `folder`; its id."""
        result = subprocess.run(
            ["sbatch", "--parsable", *map(str, arguments)],
            env=self.environment | environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job` of a job, or of one task of an array, as `12_3`."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, condition: Callable[[], object], seconds: float = 600, say: Callable[[], str] = str) -> None:
        """Wait for a condition, while requeued jobs are started as soon as they can be."""
        now = look = time.monotonic()
        end = now + seconds
        while not condition():
            now = time.monotonic()
            assert now < end, f"too late\n{self.run('squeue', '--all')}\n{say()}"
            if now >= look:  # a client of Slurm takes as much time as a step of the training that is waited for
                self._start_requeued()
                look = now + 0.5
            time.sleep(0.1)

    def ended(self, job: str) -> bool:
        """Whether a job, with all tasks of its array, has left the queue."""
        states = self.run("squeue", "--noheader", "--array", "--states=all", "--jobs", job, "--format=%T", check=False)
        return bool(states) and set(states.split()) <= ENDED

    def busy(self) -> bool:
        """Whether a job runs, or is about to."""
        return bool(self.run("squeue", "--noheader"))

    def state(self, job: str) -> str:
        """State of a job, such as RUNNING or COMPLETED."""
        return self.job(job)["JobState"]

    def processes(self) -> list[psutil.Process]:
        """The processes that jobs of this cluster have started and that are alive."""
        found = []
        for process in remains(self._root):
            with suppress(psutil.Error):
                if {"SLURM_JOB_ID", "SLURMD_NODENAME"} <= set(process.environ()):
                    found.append(process)
        return found

    def end_processes(self) -> list[list[str]]:
        """Kill the processes that jobs have left behind; their command lines."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                found.append(process.cmdline())
                process.kill()
        return found

    def clear(self) -> None:
        """Cancel every job, bring back every node, and wait until nothing is left."""
        jobs = self.run("squeue", "--noheader", "--format=%A").split()
        if jobs:
            self.run("scancel", "--quiet", *jobs)
        self.wait(lambda: not self.run("squeue", "--noheader", "--states=all", "-t", "R,PD,CG"), 90)
        for node in self.run("sinfo", "--noheader", "-N", "-t", "down,drain,fail", "-o", "%N").split():
            self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        self.wait(self._all_idle, 90)

    def cut_power(self, node: str) -> None:
        """Kill everything that jobs have on a node, and let Slurm know at once that it is down."""
        for process in self.processes():
            with suppress(psutil.Error):
                if process.environ()["SLURMD_NODENAME"] == node:
                    process.kill()
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def _start(self) -> None:
        key = self._root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = [f"--{name}={self._root}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self._daemon("munged", ["--foreground", "--force", f"--key-file={key}", *files])
        self._wait_up(lambda: (self._root / "munge.socket").exists())
        self._daemon("slurmctld", ["-D", "-i"])
        for node in self.nodes:
            self._daemon("slurmd", ["-D", "-N", node], node)
        self._wait_up(self._all_idle)

    def _daemon(self, program: str, arguments: Sequence[str], name: str = "") -> None:
        with open(self._root / "log" / f"{name or program}.out", "w") as output:
            self._daemons[name or program] = subprocess.Popen(
                [shutil.which(program, path=_PATH), *arguments],
                env=self.environment,
                cwd=self._root,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_up(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 90
        while not condition():
            for name, daemon in self._daemons.items():
                assert daemon.poll() is None, f"{name}: {(self._root / 'log' / f'{name}.out').read_text()}"
            assert time.monotonic() < end, self.run("sinfo", check=False)
            time.sleep(0.05)

    def _all_idle(self) -> bool:
        idle = self.run("sinfo", "--noheader", "-N", "-p", "batch", "-t", "idle", "-o", "%N", check=False)
        return len(idle.split()) == len(self.nodes)

    def _start_requeued(self) -> None:
        waiting = self.run("squeue", "--noheader", "--array", "-t", "PD", "-o", "%i %r", check=False).splitlines()
        jobs = [line.split()[0] for line in waiting if line.endswith(" BeginTime")]
        self._pending_since = {job: self._pending_since.get(job, time.monotonic()) for job in jobs}
        for job in jobs:
            if time.monotonic() - self._pending_since[job] > SETTLE_SECONDS:
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)


_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    """Consecutive free ports, below those that the system assigns automatically."""
    for first in random.sample(range(17000, 20000, 100), 30):  # at random: another cluster may be starting, too
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return list(range(first, first + count))
    raise OSError("no free ports")


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def remains(root: Path) -> list[psutil.Process]:
    """Every process of a cluster that is alive: daemons, steps, jobs."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.environ().get("SLURM_CONF") == str(root / "slurm.conf") or (
                process.name() == "slurmstepd"
                and any(file.path.startswith(f"{root}/") for file in process.open_files())
            )
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _sweep(root: Path) -> None:
    """Kill what is left of a cluster, and remove its folder."""
    while found := remains(root):
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.1)
    shutil.rmtree(root)


if __name__ == "__main__":
    sys.stdin.read()  # until the process at the other end closes it or ends
    _sweep(Path(sys.argv[1]))
