"""Train CALM on a chunk store: RUN/calm with checkpoints and metrics.

Runs by itself or under torchrun, in any layout of tensor, pipeline, sequence and data parallelism; run again it
continues where it stopped.
"""

from calm_core.config import command
from calm_core.config.experiment import Experiment
from calm_core.errors import ExitCode

SECTIONS = ("data", "model", "head", "parallel", "training", "evaluation", "samples", "profile", "plan")


def train(experiment: Experiment, dry_run: bool) -> ExitCode:
    """Train, or check that it could start and print what would be trained."""
    if dry_run:
        from calm_core.plan.dry_run import plan_calm
        from calm_core.training.launch import check_calm

        return plan_calm(experiment, SECTIONS, check_calm)
    from calm_core.report.run_page import write_run_page
    from calm_core.training.launch import run_calm

    return run_calm(experiment, write_run_page)


if __name__ == "__main__":
    raise SystemExit(command.run(__doc__, Experiment, SECTIONS, train))
