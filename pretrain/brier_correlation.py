"""BrierLM against cross-entropy on autoregressive models of several sizes: Pearson's r, RUN/correlation.json and .png.

Trains the models one after another and scores each several times during training. Run again, it continues where it
stopped.
"""

from calm_core.config import command
from calm_core.config.scaling_config import CORRELATION_CONFIG, CorrelationConfig
from calm_core.errors import ExitCode
from calm_core.workflow.process import until_stopped

SECTIONS = ("base",)


def run(config: CorrelationConfig, dry_run: bool) -> int:
    """Train, score and report, or print what would be trained."""
    if dry_run:
        print(f"would train widths {config.widths}, each scored after steps {config.steps}, into {config.run}")
        return ExitCode.OK
    from calm_core.scaling import correlation

    if code := until_stopped(lambda: correlation.train(config)):
        return code
    print(correlation.report(config))
    return ExitCode.OK


if __name__ == "__main__":
    raise SystemExit(command.run(__doc__, CorrelationConfig, SECTIONS, run, default=CORRELATION_CONFIG))
