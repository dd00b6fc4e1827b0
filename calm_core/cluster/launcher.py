"""A launcher as a file: its `#SBATCH` lines, how its ranks are laid out, and how it is submitted."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from calm_core import config as configuration
from calm_core.cluster.slurm import missing_command
from calm_core.config import command
from calm_core.config.experiment import Experiment
from calm_core.errors import ExitCode, UserError

if TYPE_CHECKING:  # the job and status.sh run without the packages that stages need
    from calm_core.workflow.stages import StageTraining

ROOT = Path(__file__).parents[2]

SIZES = ("nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "array")

LAUNCH_LINE = re.compile(r'^launch (\S+) "?([^\s"]+)', re.MULTILINE)


@dataclass(frozen=True)
class Launcher:
    """One of `launchers/*.slurm`.

    Attributes:
        path: of the file.
        options: its `#SBATCH --name=value` lines.
        stage: that it runs.
        config: the configuration that it runs by default, below the project.
    """

    path: Path
    options: Mapping[str, str]
    stage: str
    config: str

    @classmethod
    def read(cls, path: Path) -> "Launcher":
        """Read a launcher.

        Raises:
            UserError: if there is none.
        """
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in path.parent.glob("*.slurm")))
            raise UserError(f"There is no launcher {path}: choose one of {known}.")
        text = path.read_text()
        stage, config = LAUNCH_LINE.search(text).groups()
        options = parse_options(re.findall(r"^#SBATCH (--\S+)", text, re.MULTILINE))
        return cls(path, options, stage, config.replace("$NAME", path.stem))

    def with_options(self, arguments: Sequence[str]) -> "Launcher":
        """The launcher with these options of sbatch."""
        return replace(self, options={**self.options, **parse_options(arguments)})

    @property
    def nodes(self) -> int:
        """Nodes of the job."""
        return self._number("nodes")

    @property
    def tasks(self) -> int:
        """Ranks on each node; `ntasks` counts before `ntasks-per-node`, as in Slurm."""
        if "ntasks" not in self.options:
            return self._number("ntasks-per-node")
        tasks, nodes = self._number("ntasks"), self.nodes
        if tasks % nodes:
            raise UserError(f"--ntasks={tasks} does not divide over {nodes} nodes: give --ntasks-per-node.")
        return tasks // nodes

    def _number(self, option: str) -> int:
        value = self.options[option]
        if not value.isdecimal() or int(value) < 1:
            raise UserError(f"--{option}={value} must be a whole number of at least 1.")
        return int(value)

    def resources(self) -> str:
        """The resources of the job, for a person."""
        return ", ".join(f"{name} {self.options[name]}" for name in SIZES if self.options.get(name, "0") != "0")


def parse_options(arguments: Sequence[str]) -> dict[str, str]:
    """`--name=value` and `--name` as a mapping; '' for an option without a value."""
    return {name.removeprefix("--"): value for name, _, value in (word.partition("=") for word in arguments)}


def enter_work_folder(arguments: Sequence[str]) -> list[str]:
    """Change to the folder in which jobs run; the arguments, their files made absolute as seen from here."""
    found = [str(Path(word).resolve()) if Path(word).exists() else word for word in arguments]
    os.chdir(os.environ.get("CALM_WORK") or ROOT)
    return found


def site_options() -> list[str]:
    """The options of sbatch that the site gives to every job."""
    return shlex.split(os.environ.get("EXTRA_SBATCH_ARGS", ""))


def sbatch(options: Sequence[str], path: Path, arguments: Sequence[str], test: bool = False) -> str:
    """Submit a launcher, or with `test` ask Slurm whether it could be; the job's id, or Slurm's answer.

    Raises:
        UserError: in Slurm's words, if it refuses; or if there is no Slurm.
    """
    words = ["sbatch", "--test-only" if test else "--parsable", *options, str(path), *arguments]
    try:
        result = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(missing_command("sbatch")) from error
    if result.returncode:
        raise UserError(f"Slurm refuses {path.name} {' '.join(options)}: {result.stderr.strip()}")
    return (result.stderr if test else result.stdout).strip().partition(";")[0]


def describe_layout(training: "StageTraining", nodes: int, tasks: int) -> str:
    """Ranks, layout and accumulation of a training on `nodes` nodes of `tasks` ranks, in one line.

    Raises:
        UserError: if the ranks do not divide so; the sentence ends with the nearest number of nodes that works.
    """
    try:
        return _describe(training, nodes * tasks)
    except UserError as error:
        near = nearest_nodes(training, nodes, tasks)
        advice = f"sbatch --nodes={near} is the nearest that works" if near else "no number of nodes works"
        raise UserError(f"{error} On nodes of {tasks} ranks, {advice}.") from error


def nearest_nodes(training: "StageTraining", nodes: int, tasks: int) -> int | None:
    """The number of nodes nearest to `nodes` that a training can run on; None if there is none up to four times it."""
    for count in sorted(range(1, 4 * nodes + 1), key=lambda count: abs(count - nodes)):
        try:
            _describe(training, count * tasks)
        except UserError:
            continue
        return count
    return None


def _describe(training: "StageTraining", world: int) -> str:
    config, layout = training.config, training.layout
    data = layout.data_parallel(world) if layout else world
    accumulated = config.micro_batches(data, layout.micro_batch_multiple if layout else 1)
    ranks = "1 rank" if world == 1 else f"{world} ranks"
    model = f"tensor {layout.tensor} x pipeline {layout.pipeline} x " if layout else ""
    return (
        f"{ranks} = {model}data {data}; global batch {config.global_batch} = {data} x micro-batch "
        f"{config.least_micro_batch} x {accumulated} accumulated"
        + (", or the larger ones that fit" if config.micro_batch == "auto" else "")
    )


def check(launcher: Launcher, options: Sequence[str], training: "StageTraining | None") -> list[str]:
    """What is known of a job before it is submitted: its resources and, for a training, its layout.

    Raises:
        UserError: if the configuration cannot be trained on these ranks, or Slurm has no such nodes.
    """
    layout = [describe_layout(training, launcher.nodes, launcher.tasks)] if training else []
    sbatch(options, launcher.path, [], test=True)
    return [launcher.resources(), *layout]


def main(arguments: Sequence[str]) -> int:
    """Check and submit one launcher: `NAME [--sbatch-option=value ...] [CONFIG.yaml] [key=value ...] [--dry-run]`."""
    from calm_core.workflow.stages import find_stage

    if not arguments or arguments[0] in ("-h", "--help"):
        print(main.__doc__)
        return ExitCode.OK
    name, *rest = arguments
    options = [*site_options(), *(word for word in rest if word.startswith("-") and word != "--dry-run")]
    if short := next((word for word in options if not word.startswith("--")), None):
        raise UserError(f"{short} is not understood here: write options of sbatch as --name=value, such as --nodes=4.")
    given = [word for word in rest if not word.startswith("-")]
    file = ROOT / "launchers" / f"{name.removesuffix('.slurm')}.slurm"
    launcher = Launcher.read(file).with_options(options)
    path = Path(given.pop(0) if given and "=" not in given[0] else ROOT / launcher.config)
    if not path.is_file():
        raise UserError(f"There is no configuration {path}: give one, as in `submit.sh {name} configs/calm_m.yaml`.")
    experiment = configuration.load(Experiment, path, given)
    print("\n".join(check(launcher, options, find_stage(experiment, launcher.stage).training)))
    if "--dry-run" in rest:
        print("checked, not submitted")
        return ExitCode.OK
    print(f"submitted as job {sbatch(options, launcher.path, [str(path.resolve()), *given])}")
    return ExitCode.OK


if __name__ == "__main__":
    raise SystemExit(command.guard(lambda: main(enter_work_folder(sys.argv[1:]))))
