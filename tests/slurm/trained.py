"""A real training on the cluster of a test, and the faults that a test gives it."""

import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from cluster import Cluster
from launching import ROOT

from calm_core.checkpoint.folder import list_checkpoints
from calm_core.io import read_json_lines
from calm_core.training.run_log import read_metrics

FOREVER = 100_000
STEPS = 120  # of the uninterrupted run: more than an interrupted one does, on a fast machine too
UNRELIABLE = """#!/bin/bash
# Slurm's client, which gets no answer every other time.
echo >> {calls}
(( $(wc -l < {calls}) % 2 )) || exec {client} "$@"
echo "Unable to contact slurm controller (connect failure)" >&2
exit 1
"""
TINY = ("--gpus-per-node=0", "--cpus-per-task=1")
SMALL = ("--ntasks-per-node=1", *TINY)

# A batch script of an array whose last task submits a job, and notes its id.
OUTER = """#!/bin/bash
[[ $SLURM_ARRAY_TASK_ID == $SLURM_ARRAY_TASK_MAX ]] || exit 0
sbatch --parsable "$@" > id.new && mv id.new id
"""


class Training:
    """The tiny experiment under `launchers/calm_m.slurm`, two nodes of one rank; a checkpoint every five steps."""

    def __init__(self, cluster: Cluster, run: Path, folder: Path) -> None:
        self.cluster, self.run, self.folder = cluster, run, folder
        self.config = run / "config.yaml"
        text = self.config.read_text().replace("save_every: 0", "save_every: 5")
        text = re.sub(r"^run: .*\n", "", text, flags=re.MULTILINE)
        self.config.write_text(f"{text}run: {run}\n")
        self.set_steps(FOREVER)
        self.job, self._environment = "", {}

    @classmethod
    def of_copy(cls, cluster: Cluster, experiment: Path, folder: Path) -> "Training":
        """A training in a copy of an experiment."""
        return cls(cluster, Path(shutil.copytree(experiment, folder / "tiny")), folder)

    def set_steps(self, steps: int) -> None:
        """Change the number of steps for starts to come: the configuration is read at each."""
        self.config.write_text(re.sub(r" steps: \d+", f" steps: {steps}", self.config.read_text()))

    def submit(self, *options: str, nodes: int = 2, arguments: tuple[str, ...] = ()) -> str:
        """Submit the launcher; the job's id."""
        words = [f"--nodes={nodes}", *SMALL, *options, ROOT / "launchers" / "calm_m.slurm", self.config, *arguments]
        self.job = self.cluster.submit(*words, folder=self.folder, **self._environment)
        return self.job

    def submit_from_an_array(self, launcher: Path, *options: str) -> str:
        """Submit the training from within a task of an array; the id of the job, which is held in the queue."""
        outer = self.folder / "outer.sh"
        outer.write_text(OUTER)
        words = ["--array=3-4", "--output=outer-%a.out", outer, "--hold", *TINY, *options, launcher, self.config]
        self.cluster.submit(*words, folder=self.folder)
        self.cluster.wait((self.folder / "id").exists)
        self.job = (self.folder / "id").read_text().strip()
        return self.job

    def lose_every_other_answer(self) -> None:
        """From now on, every other call of Slurm fails in jobs, as if its controller were restarting."""
        client, path = self.folder / "clients" / "scontrol", self.cluster.environment["PATH"]
        client.parent.mkdir()
        client.write_text(UNRELIABLE.format(calls=f"{client}.calls", client=shutil.which(client.name, path=path)))
        client.chmod(0o755)
        self._environment = {"PATH": f"{client.parent}:{path}"}

    def tool(self, name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run one of the shell scripts that a person calls, in the folder of this training."""
        return subprocess.run(
            [ROOT / "launchers" / name, *map(str, arguments)],
            env=self.cluster.environment | {"CALM_WORK": str(self.folder)} | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def freeze(self, beyond: int) -> int:
        """Halt rank 1, and all with it, when there is a checkpoint of a step beyond one; the newest one's step."""
        self.cluster.wait(lambda: self.saved > beyond, say=self.log)
        self.rank(1).suspend()
        return self.saved

    def thaw(self) -> None:
        """Resume rank 1."""
        self.rank(1).resume()

    def rank(self, number: int) -> psutil.Process | None:
        """The process of a rank that trains, if it is there."""
        for process in self.cluster.processes():
            with suppress(psutil.Error):
                if process.environ().get("RANK") == str(number) and "train_calm.py" in " ".join(process.cmdline()):
                    return process
        return None

    def wait_for_end(self) -> dict[str, str]:
        """Wait until the job has left the queue; what Slurm says of it then."""
        self.cluster.wait(lambda: self.cluster.ended(self.job), say=self.log)
        return self.cluster.job(self.job)

    def wait_for(self, words: str) -> None:
        """Wait until the main log contains some words."""
        self.cluster.wait(lambda: words in self.log(), say=self.log)

    def log(self) -> str:
        """The main log."""
        path = self.folder / f"train-{self.job}.out"
        return path.read_text() if path.exists() else ""

    def rank_log(self, restart: int, rank: int = 0) -> str:
        """What a rank has printed in an attempt."""
        return (self.run / "slurm" / "train_calm" / f"{self.job}.{restart}" / f"rank-{rank:04}.log").read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of a name in the journal of this job."""
        path = self.run / "slurm" / "train_calm" / "journal.jsonl"
        events = read_json_lines(path)
        return [event for event in events if event["event"] == name and event["job"] == self.job]

    @property
    def saved(self) -> int:
        """The step of the newest checkpoint."""
        found = list_checkpoints(self.run / "calm" / "checkpoints")
        return int(found[-1].name.removeprefix("step-")) if found else 0

    @property
    def losses(self) -> dict[int, float]:
        """Loss by step; every step once, in order."""
        records = read_metrics(self.run / "calm" / "metrics.jsonl", "train")
        assert [record["step"] for record in records] == list(range(1, len(records) + 1))
        return {record["step"]: record["loss"] for record in records}

    def resumed_from(self, *saved: int) -> bool:
        """Whether the restarts resumed from exactly these checkpoints."""
        resumed = [f"resumed from {self.run}/calm/checkpoints/step-{step}\n" for step in saved]
        return all(line in self.rank_log(number) for number, line in enumerate(resumed, 1)) and (
            [event["step"] for event in self.events("start")] == [0, *saved]
        )


def same_curve(training: Training, reference: Training, steps: int) -> bool:
    """Whether two runs have the same losses to the last bit, over exactly so many steps of the first."""
    expected = {step: loss for step, loss in reference.losses.items() if step <= steps}
    return len(expected) == steps and training.losses == expected
