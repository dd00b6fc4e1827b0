"""Variants of one experiment, trained with the same FLOPs and compared in one table: RUN/results.json.

Trains the models one after another, several seeds where the configuration says so; run again it continues where it
stopped, and shows the table of what is finished.
"""

from pathlib import Path

from calm_core.config import command
from calm_core.config.scaling_config import VARIANTS_CONFIG, VariantsConfig
from calm_core.errors import ExitCode
from calm_core.workflow.process import until_stopped

SECTIONS = ("base", "variants")


def run(config: VariantsConfig, dry_run: bool) -> int:
    """Train and report, or print what would be trained."""
    from calm_core.io import read_json
    from calm_core.scaling import variants

    if dry_run:
        for model in variants.models(config):
            settings = " ".join(model.variant.settings)
            print(f"{model.name}: {model.experiment.training.steps} steps, {model.flops:.3g} FLOPs; {settings}")
        return ExitCode.OK
    if code := until_stopped(lambda: variants.train(config)):
        return code
    print(variants.report(read_json(Path(config.run) / "results.json")))
    return ExitCode.OK


if __name__ == "__main__":
    raise SystemExit(command.run(__doc__, VariantsConfig, SECTIONS, run, default=VARIANTS_CONFIG))
