"""A real training on a cluster of a test, and what may befall it."""

import json
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
from calm_core.training.run_log import read_metrics

FOREVER = 100_000
STEPS = 120  # of the run that nothing interrupts: more than an interrupted one does, on a fast machine too
FORGETFUL = """#!/bin/bash
# Slurm's client, which every other time finds nobody.
echo >> {calls}
(( $(wc -l < {calls}) % 2 )) || exec {client} "$@"
echo "Unable to contact slurm controller (connect failure)" >&2
exit 1
"""
SMALL = ("--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")


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

    def forget_every_other_answer(self) -> None:
        """Let Slurm be as if its controller were restarting, again and again, for jobs to come."""
        client, path = self.folder / "clients" / "scontrol", self.cluster.environment["PATH"]
        client.parent.mkdir()
        client.write_text(FORGETFUL.format(calls=f"{client}.calls", client=shutil.which(client.name, path=path)))
        client.chmod(0o755)
        self._environment = {"PATH": f"{client.parent}:{path}"}

    def tool(self, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run one of the launchers that a person calls, where this training works."""
        return subprocess.run(
            [ROOT / "launchers" / name, *map(str, arguments)],
            env=self.cluster.environment | {"CALM_WORK": str(self.folder)},
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
        """Let rank 1 go on."""
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
        """Wait until the main log says something."""
        self.cluster.wait(lambda: words in self.log(), say=self.log)

    def log(self) -> str:
        """The main log."""
        path = self.folder / f"calm_m-{self.job}.out"
        return path.read_text() if path.exists() else ""

    def rank_log(self, restart: int, rank: int = 0) -> str:
        """What a rank has printed in an attempt."""
        return (self.run / "slurm" / "train_calm" / f"{self.job}.{restart}" / f"rank-{rank:04}.log").read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of a name in the journal of this job."""
        path = self.run / "slurm" / "train_calm" / "journal.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()]
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

    def went_on_from(self, *saved: int) -> bool:
        """Whether the restarts went on from just these checkpoints."""
        resumed = [f"resumed from {self.run}/calm/checkpoints/step-{step}\n" for step in saved]
        return all(line in self.rank_log(number) for number, line in enumerate(resumed, 1)) and (
            [event["step"] for event in self.events("start")] == [0, *saved]
        )


def same_curve(training: Training, reference: Training, steps: int) -> bool:
    """Whether two runs have the same losses to the last bit, over exactly so many steps of the first."""
    expected = {step: loss for step, loss in reference.losses.items() if step <= steps}
    return len(expected) == steps and training.losses == expected
