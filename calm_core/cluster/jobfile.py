"""A launcher as a file: its `#SBATCH` lines, and how it is submitted."""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from calm_core.errors import UserError

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
