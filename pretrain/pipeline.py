"""The whole workflow as one command: tokenizer, tokens, autoencoder, chunks, CALM, evaluation, samples, summary.

Each stage runs the script that a user would run, with the same configuration. A second run skips finished stages;
a run that was killed continues where it stopped.
"""

from dataclasses import fields
from pathlib import Path

from calm_core.config import command
from calm_core.config.experiment import Experiment
from calm_core.errors import ExitCode
from calm_core.workflow.process import until_stopped

SECTIONS = tuple(field.name for field in fields(Experiment))


def run(experiment: Experiment, dry_run: bool) -> int:
    """Run the stages and write a summary, or print their command lines."""
    from calm_core.workflow.stages import run_stages, stages

    if dry_run:
        print("\n".join(" ".join(stage.command) for stage in stages(experiment)))
        return ExitCode.OK
    if code := until_stopped(lambda: run_stages(experiment)):
        return code
    from calm_core.report.run_page import write_run_page
    from calm_core.report.summary import format_summary, plot_experiment, write_summary

    plot_experiment(experiment)
    write_run_page(Path(experiment.run))
    print(format_summary(write_summary(experiment)))
    return ExitCode.OK


if __name__ == "__main__":
    raise SystemExit(command.run(__doc__, Experiment, SECTIONS, run))
