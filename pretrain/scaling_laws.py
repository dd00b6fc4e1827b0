"""Scaling laws over size, data and K, on one YAML: scaling_laws.py ACTION [CONFIG.yaml] [key=value ...].

plan:    the models that the ladder and the grid give, what each costs, how long it takes; nothing runs.
prepare: what the models share: tokenizer, tokens, and for each K the autoencoder and the chunks. Then RUN/models.txt
         lists the models' configurations, and the sbatch command is printed that trains them as an array of jobs.
run:     prepare, then the models one after another; finished ones are skipped, half-done ones resume, and what fails is
         named at the end. task=N trains model N of the plan alone, after prepare.
fit:     the evaluations in RUN/results.parquet, the laws fitted to them in RUN/laws.json.
plot:    the figures of results and laws below RUN/figures, and all of it on one page, RUN/report.html.
"""

import sys
from collections.abc import Sequence

from calm_core.config import command
from calm_core.config.scaling_config import DEFAULT_CONFIG, ScalingConfig
from calm_core.errors import UserError

SECTIONS = ("ladder", "grid", "fit", "hardware", "base")


def plan(config: ScalingConfig, dry_run: bool) -> None:
    """Print the table of models and costs."""
    from calm_core.scaling.points import plan_table

    print(plan_table(config))


def prepare(config: ScalingConfig, dry_run: bool) -> int | None:
    """Make what the models share."""
    from calm_core.scaling import sweep

    return plan(config, dry_run) if dry_run else sweep.prepare(config)


def run(config: ScalingConfig, dry_run: bool) -> int | None:
    """Train the models, or one of them."""
    from calm_core.scaling import sweep

    return plan(config, dry_run) if dry_run else sweep.run(config)


def fit(config: ScalingConfig, dry_run: bool) -> None:
    """Collect the results, fit the laws, print them."""
    from calm_core.scaling.study_report import fit_study

    print(fit_study(config, write=not dry_run))


def plot(config: ScalingConfig, dry_run: bool) -> None:
    """Draw the figures, and print where they are."""
    if dry_run:
        print(f"would draw the results of {config.run}")
        return
    from calm_core.scaling.study_report import draw_study, write_scaling_page

    print("\n".join(map(str, [*draw_study(config), write_scaling_page(config)])))


ACTIONS = {"plan": plan, "prepare": prepare, "run": run, "fit": fit, "plot": plot}


def main(argv: Sequence[str]) -> int:
    """Hand over to the action that the first argument names."""
    if argv and argv[0] in ACTIONS:
        return command.run(__doc__, ScalingConfig, SECTIONS, ACTIONS[argv[0]], argv[1:], DEFAULT_CONFIG)
    if argv and argv[0] in ("-h", "--help"):
        return command.run(__doc__, ScalingConfig, SECTIONS, plan, argv)
    return command.guard(_no_action)


def _no_action() -> None:
    raise UserError(f"scaling_laws.py needs one of {', '.join(ACTIONS)} as its first argument; --help says more.")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
