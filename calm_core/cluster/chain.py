"""All stages of an experiment as jobs that wait for each other: tokens, autoencoder, chunks, CALM, its evaluation.

Submitted again it passes over what is finished and joins on to what is still in the queue.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from calm_core import config as configuration
from calm_core.cluster import slurm
from calm_core.cluster.launcher import JobFile, check, enter_work_folder, sbatch, site_options
from calm_core.config import command
from calm_core.config.experiment import Experiment
from calm_core.errors import ExitCode
from calm_core.io import read_json, write_json
from calm_core.workflow.stages import ROOT, Ledger, Stage, config_path, inputs_of, require_named, stages, stamp

LAUNCHERS = {
    "train_tokenizer": "tokenize",
    "tokenize_corpus": "tokenize",
    "train_autoencoder": "autoencoder",
    "build_chunks": "build_chunks",
    "train_calm": "calm_m",
}  # the rest: "evaluate"

SHARED = ("tokenize_corpus", "build_chunks")  # stages that the tasks of an array can share


@dataclass(frozen=True)
class Link:
    """One job of the chain.

    Attributes:
        name: of the job, another one for each.
        stage: that it runs.
        options: of sbatch.
        arguments: of the launcher.
    """

    name: str
    stage: str
    launcher: Path
    options: list[str]
    arguments: list[str]


def links(experiment: Experiment, config: Path, todo: list[Stage]) -> Iterator[Link]:
    """The jobs of the stages that are to be done, in order."""
    pipeline = experiment.pipeline
    own = config.stem if (ROOT / "launchers" / f"{config.stem}.slurm").exists() else ""
    for stage in todo:
        file = LAUNCHERS.get(stage.name, "evaluate")
        if stage.name == "train_calm" and own:
            file = own
        path, arguments = ROOT / "launchers" / f"{file}.slurm", ["--stage", stage.name, str(config_path(experiment))]
        options = [f"--job-name={stage.name}"]
        if stage.name == "train_calm" and pipeline.nodes:
            options.append(f"--nodes={pipeline.nodes}")
        if stage.name in SHARED and pipeline.shares > 1:
            yield Link(stage.name, stage.name, path, [*options, f"--array=0-{pipeline.shares - 1}"], arguments)
            finish = f"{stage.name}-finish"
            yield Link(finish, stage.name, path, [f"--job-name={finish}"], [*arguments, "--finish"])
        else:
            yield Link(stage.name, stage.name, path, options, arguments)


def unfinished(experiment: Experiment) -> list[Stage]:
    """The stages that are neither given nor finished with this configuration."""
    plan = stages(experiment)
    inputs, ledger = inputs_of(experiment, plan), Ledger(Path(experiment.run) / "stages.json")
    products = [stage.product for stage in plan]
    return [
        stage
        for number, stage in enumerate(plan, 1)
        if not stage.given and not ledger.finished(stage.name, stamp(inputs, products[:number]))
    ]


def submit(experiment: Experiment, config: Path, dry_run: bool) -> int:
    """Check all jobs, then submit them, each after the one before; or print them.

    Raises:
        UserError: if one of them cannot run; none is submitted then. Or if Slurm does not answer: submit again.
    """
    todo = unfinished(experiment)
    require_named(todo)
    jobs = list(links(experiment, config, todo))
    for link in jobs:
        options = [*site_options(), *link.options]
        print(f"{link.name}: sbatch {' '.join([*options, str(link.launcher), *link.arguments])}")
        for line in check(JobFile.read(link.launcher).with_options(options), options, experiment, link.stage):
            print(f"    {line}")
    if not jobs:
        print("nothing to do: every stage is finished")
    if not dry_run and jobs:
        _submit(experiment, jobs)
    return ExitCode.OK


def _submit(experiment: Experiment, jobs: list[Link]) -> None:
    folder = Path(experiment.run) / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    configuration.save(experiment, config_path(experiment))
    known = folder / "chain.json"
    submitted = read_json(known) if known.exists() else {}
    before = ""
    for link in jobs:
        job = submitted.get(link.name, "")
        if not job or not slurm.is_queued(job):
            after = [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"] if before else []
            array = any(option.startswith("--array") for option in link.options)
            output = f"--output={folder.resolve()}/%x-{'%A_%a' if array else '%j'}.out"
            job = sbatch([*site_options(), *link.options, output, *after], link.launcher, link.arguments)
            write_json(known, submitted := {**submitted, link.name: job})
            print(f"{link.name}: job {job}{f' after {before}' if before else ''}")
        else:
            print(f"{link.name}: in the queue already, job {job}")
        before = job


def main(arguments: list[str]) -> int:
    """`CONFIG.yaml [key=value ...] [--dry-run]`, as every command takes them."""
    config = next((Path(word) for word in arguments if word.endswith((".yaml", ".yml")) and "=" not in word), None)
    sections = [field.name for field in fields(Experiment)]

    def action(experiment: Experiment, dry_run: bool) -> int:
        return submit(experiment, config or command.DEFAULT_CONFIG, dry_run)

    return command.run(__doc__, Experiment, sections, action, arguments)


if __name__ == "__main__":
    raise SystemExit(main(enter_work_folder(sys.argv[1:])))
