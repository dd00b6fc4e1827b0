"""Train the autoencoder on token shards and freeze it: RUN/autoencoder, RUN/autoencoder/frozen.

Runs by itself or under torchrun (data parallel); run again it continues where it stopped.
"""

from calm_core.config import command
from calm_core.config.experiment import Experiment
from calm_core.errors import ExitCode

SECTIONS = ("data", "autoencoder", "autoencoder_training", "profile", "plan")


def train(experiment: Experiment, dry_run: bool) -> ExitCode:
    """Train, or check that it could start and print what would be trained."""
    if dry_run:
        from calm_core.plan.dry_run import plan_autoencoder
        from calm_core.training.launch import check_autoencoder

        return plan_autoencoder(experiment, SECTIONS, check_autoencoder)
    from calm_core.report.run_page import write_run_page
    from calm_core.training.launch import run_autoencoder

    return run_autoencoder(experiment, write_run_page)


if __name__ == "__main__":
    raise SystemExit(command.run(__doc__, Experiment, SECTIONS, train))
