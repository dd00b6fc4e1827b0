"""A launcher as a file: its `#SBATCH` lines, and how it is submitted."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from calm_core import config as configuration
from calm_core.config import command
from calm_core.config.experiment import Experiment
from calm_core.errors import ExitCode, UserError

ROOT = Path(__file__).parents[2]

SIZES = ("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "array")


@dataclass(frozen=True)
class JobFile:
    """One of `launchers/*.slurm`.

    Attributes:
        path: of the file.
        options: its `#SBATCH --name=value` lines.
        stage: what it runs.
        config: the configuration that it runs by default, below the project.
    """

    path: Path
    options: Mapping[str, str]
    stage: str
    config: str

    @classmethod
    def read(cls, path: Path) -> "JobFile":
        """Read a launcher.

        Raises:
            UserError: if there is none.
        """
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in path.parent.glob("*.slurm")))
            raise UserError(f"There is no launcher {path}: choose one of {known}.")
        text = path.read_text()
        launch = re.search(r"^launch (\S+) (\S+)", text, re.MULTILINE)
        return cls(path, parse_options(re.findall(r"^#SBATCH (--\S+)", text, re.MULTILINE)), *launch.groups())

    def with_options(self, arguments: Sequence[str]) -> "JobFile":
        """The job that these options of sbatch make of it."""
        return JobFile(self.path, {**self.options, **parse_options(arguments)}, self.stage, self.config)

    @property
    def nodes(self) -> int:
        """Nodes of the job."""
        return int(self.options["nodes"])

    @property
    def tasks(self) -> int:
        """Ranks on each of them."""
        return int(self.options["ntasks-per-node"])

    def resources(self) -> str:
        """What the job takes, for a person."""
        return ", ".join(f"{name} {self.options[name]}" for name in SIZES if self.options.get(name, "0") != "0")


def parse_options(arguments: Sequence[str]) -> dict[str, str]:
    """`--name=value` and `--name` as a mapping; '' for an option without a value."""
    return {name.removeprefix("--"): value for name, _, value in (word.partition("=") for word in arguments)}


def enter_work_folder(arguments: Sequence[str]) -> list[str]:
    """Go where the jobs run, so that relative paths mean the same; the arguments, with files made absolute."""
    found = [str(Path(word).resolve()) if Path(word).exists() else word for word in arguments]
    os.chdir(os.environ.get("CALM_WORK") or ROOT)
    return found


def site_options() -> list[str]:
    """Options that the site gives to every job."""
    return shlex.split(os.environ.get("EXTRA_SBATCH_ARGS", ""))


def sbatch(options: Sequence[str], path: Path, arguments: Sequence[str], test: bool = False) -> str:
    """Submit a launcher, or ask Slurm with `test` whether it could be; the job's id, or Slurm's answer.

    Raises:
        UserError: with Slurm's words, if it refuses.
    """
    how = ["--test-only"] if test else ["--parsable"]
    result = subprocess.run(
        ["sbatch", *how, *options, str(path), *arguments], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise UserError(f"Slurm refuses {path.name} {' '.join(options)}: {result.stderr.strip()}")
    return (result.stderr if test else result.stdout).strip().partition(";")[0]


def describe_layout(experiment: Experiment, stage: str, nodes: int, tasks: int) -> str:
    """Ranks, layout and accumulation of a training on `nodes` nodes of `tasks` ranks, in a line.

    Raises:
        UserError: if it cannot be dealt out so; the sentence ends with the number of nodes nearest to it that works.
    """
    try:
        return _describe(experiment, stage, nodes * tasks)
    except UserError as refusal:
        near = nearest_nodes(experiment, stage, nodes, tasks)
        advice = f"sbatch --nodes={near} is the nearest that works" if near else "no number of nodes works"
        raise UserError(f"{refusal} On nodes of {tasks} ranks, {advice}.") from refusal


def nearest_nodes(experiment: Experiment, stage: str, nodes: int, tasks: int) -> int | None:
    """The number of nodes nearest to `nodes` that a training can run on; None if there is none up to four times it."""
    for count in sorted(range(1, 4 * nodes + 1), key=lambda count: abs(count - nodes)):
        try:
            _describe(experiment, stage, count * tasks)
        except UserError:
            continue
        return count
    return None


def _describe(experiment: Experiment, stage: str, world: int) -> str:
    if stage == "train_autoencoder":
        training, shared, multiple = experiment.autoencoder_training, "", 1
        data = world
    else:
        training, layout = experiment.training, experiment.parallel
        shared, multiple = f"tensor {layout.tensor} x pipeline {layout.pipeline} x ", layout.micro_batch_multiple
        data = layout.data_parallel(world)
    accumulated = training.micro_batches(data, multiple)
    ranks = "1 rank" if world == 1 else f"{world} ranks"
    return (
        f"{ranks} = {shared}data {data}; global batch {training.global_batch} = {data} x micro-batch "
        f"{training.micro_batch} x {accumulated} accumulated"
    )


TRAININGS = ("train_autoencoder", "train_calm")


def check(job: JobFile, options: Sequence[str], experiment: Experiment, stage: str) -> list[str]:
    """What can be said of a job before it is submitted: its resources and, of a training, its layout.

    Raises:
        UserError: if the configuration cannot be trained on so many ranks, or Slurm has no such nodes.
    """
    lines = [job.resources()]
    if stage in TRAININGS:
        lines.append(describe_layout(experiment, stage, job.nodes, job.tasks))
    sbatch(options, job.path, [], test=True)
    return lines


def main(arguments: Sequence[str]) -> int:
    """Check and submit one launcher."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return ExitCode.OK
    name, *rest = arguments
    options = [*site_options(), *(word for word in rest if word.startswith("--") and word != "--dry-run")]
    given = [word for word in rest if not word.startswith("--")]
    job = JobFile.read(ROOT / "launchers" / f"{name.removesuffix('.slurm')}.slurm").with_options(options)
    path = given.pop(0) if given and "=" not in given[0] else str(ROOT / job.config)
    experiment = configuration.load(Experiment, Path(path), given)
    print("\n".join(check(job, options, experiment, job.stage)))
    if "--dry-run" in rest:
        print("checked, not submitted")
        return ExitCode.OK
    print(f"submitted as job {sbatch(options, job.path, [str(Path(path).resolve()), *given])}")
    return ExitCode.OK


if __name__ == "__main__":
    raise SystemExit(command.guard(lambda: main(enter_work_folder(sys.argv[1:]))))
