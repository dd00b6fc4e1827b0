"""Check a launcher on the login node, then submit it: configuration, layout, and whether Slurm has such nodes at all.

`launchers/submit.sh NAME [--sbatch-option=value ...] [CONFIG.yaml] [key=value ...] [--dry-run]`
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from calm_core import command
from calm_core import config as configuration
from calm_core.cluster.jobfile import JobFile, enter_work_folder, sbatch, site_options
from calm_core.cluster.layout import describe_layout
from calm_core.errors import ExitCode
from calm_core.experiment import Experiment
from calm_core.pipeline.stages import ROOT

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
