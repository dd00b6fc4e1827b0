"""All stages of an experiment as jobs that wait for each other: tokens, autoencoder, chunks, CALM, evaluation.

Submitted again, it skips finished stages and waits for the jobs that are still in the queue.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from calm_core.cluster import slurm
from calm_core.cluster.launcher import Launcher, check, enter_work_folder, sbatch, site_options
from calm_core.config import command
from calm_core.config.experiment import Experiment
from calm_core.errors import ExitCode
from calm_core.io import read_json, write_json
from calm_core.workflow.ledger import Ledger, stamp
from calm_core.workflow.stages import ROOT, Stage, config_path, inputs_of, require_given_products, save_configs, stages


@dataclass(frozen=True)
class ChainedJob:
    """One job of the chain.

    Attributes:
        name: of the job, unique in the chain.
        stage: that it runs.
        launcher: the file to submit.
        options: of sbatch.
        arguments: of the launcher.
    """

    name: str
    stage: Stage
    launcher: Path
    options: list[str]
    arguments: list[str]


def chain(experiment: Experiment, config: Path, todo: list[Stage]) -> Iterator[ChainedJob]:
    """The jobs of the stages that have to run, in order. A model that has a launcher of its own is trained by that."""
    tasks, nodes = experiment.pipeline.shares, experiment.pipeline.nodes
    for stage in todo:
        layout = stage.training and stage.training.layout
        path = _launcher_of(stage, config)
        arguments = ["--stage", stage.name, str(config_path(experiment))]
        options = [f"--job-name={stage.name}"]
        if layout and nodes:
            options.append(f"--nodes={nodes}")
        if stage.shareable and tasks > 1:
            yield ChainedJob(stage.name, stage, path, [*options, f"--array=0-{tasks - 1}"], arguments)
            finish = f"{stage.name}-finish"
            yield ChainedJob(finish, stage, path, [f"--job-name={finish}"], [*arguments, "--finish"])
        else:
            yield ChainedJob(stage.name, stage, path, options, arguments)


def _launcher_of(stage: Stage, config: Path) -> Path:
    """The launcher that trains this configuration by default, such as calm_xl; else the stage's."""
    folder = ROOT / "launchers"
    if (own := folder / f"{config.stem}.slurm").is_file():
        launcher = Launcher.read(own)
        if (launcher.stage, Path(launcher.config).stem) == (stage.name, config.stem):
            return own
    return folder / f"{stage.launcher}.slurm"


def unfinished(experiment: Experiment) -> list[Stage]:
    """The stages that are neither given nor finished with this configuration."""
    plan = stages(experiment)
    inputs, ledger = inputs_of(experiment, plan), Ledger(Path(experiment.run) / "stages.json")
    products = [stage.product for stage in plan]
    return [
        stage
        for number, stage in enumerate(plan, 1)
        if not stage.given and not ledger.is_finished(stage.name, stamp(inputs, products[:number]))
    ]


def submit(experiment: Experiment, config: Path, dry_run: bool) -> int:
    """Check all jobs, then submit them, each after the one before; or only print them.

    Raises:
        UserError: if one of them cannot run; none is submitted then. Or if Slurm does not answer: submit again.
    """
    todo = unfinished(experiment)
    require_given_products(todo)
    jobs = list(chain(experiment, config, todo))
    for job in jobs:
        options = [*site_options(), *job.options]
        print(f"{job.name}: sbatch {' '.join([*options, str(job.launcher), *job.arguments])}")
        for line in check(Launcher.read(job.launcher).with_options(options), options, job.stage.training):
            print(f"    {line}")
    if not jobs:
        print("nothing to do: every stage is finished")
    if not dry_run and jobs:
        _submit(experiment, jobs)
    return ExitCode.OK


def _submit(experiment: Experiment, jobs: list[ChainedJob]) -> None:
    folder = Path(experiment.run) / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    save_configs(experiment)
    known = folder / "chain.json"
    submitted = read_json(known) if known.exists() else {}
    before = ""
    for job in jobs:
        number = submitted.get(job.name, "")
        if not number or not slurm.is_queued(number):
            after = [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"] if before else []
            array = any(option.startswith("--array") for option in job.options)
            output = f"--output={folder.resolve()}/%x-{'%A_%a' if array else '%j'}.out"
            number = sbatch([*site_options(), *job.options, output, *after], job.launcher, job.arguments)
            write_json(known, submitted := {**submitted, job.name: number})
            print(f"{job.name}: job {number}{f' after {before}' if before else ''}")
        else:
            print(f"{job.name}: in the queue already, job {number}")
        before = number


def main(arguments: list[str]) -> int:
    """`CONFIG.yaml [key=value ...] [--dry-run]`, as every command takes them."""
    config = next((Path(word) for word in arguments if word.endswith((".yaml", ".yml")) and "=" not in word), None)
    sections = [field.name for field in fields(Experiment)]

    def action(experiment: Experiment, dry_run: bool) -> int:
        return submit(experiment, config or command.DEFAULT_CONFIG, dry_run)

    return command.run(__doc__, Experiment, sections, action, arguments)


if __name__ == "__main__":
    raise SystemExit(main(enter_work_folder(sys.argv[1:])))
