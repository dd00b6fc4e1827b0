"""The run of a study: what is shared first, then every model; each is an ordinary experiment in its own folder."""

import sys
from pathlib import Path

from calm_core import config as configuration
from calm_core.data.manifest import MANIFEST
from calm_core.errors import ExitCode, UserError
from calm_core.pipeline.stages import config_path, run_stages
from calm_core.scaling.config import ScalingConfig
from calm_core.scaling.points import experiment, family_experiment, points, shared_experiment

SHARED = ("train_tokenizer", "tokenize_corpus")
FAMILY = ("train_autoencoder", "evaluate_autoencoder", "build_chunks")
MODEL = ("train_calm",)
LIST = "models.txt"


def prepare(config: ScalingConfig) -> int:
    """Make what the models share: tokenizer, tokens, and the autoencoder and chunks of each K. Finished parts stay.

    Then every model is a configuration of its own, and RUN/models.txt lists them: what an array of jobs works on.

    Returns:
        The exit code of the first part that fails, or OK.
    """
    for part, names in [
        (shared_experiment(config), SHARED),
        *((family_experiment(config, k), FAMILY) for k in config.grid.k),
    ]:
        if code := run_stages(part, names):
            return code
    _write_list(config)
    return ExitCode.OK


def _write_list(config: ScalingConfig) -> None:
    paths = []
    for point in points(config):
        of_point = experiment(config, point)
        Path(of_point.run).mkdir(parents=True, exist_ok=True)
        configuration.save(of_point, config_path(of_point))
        paths.append(config_path(of_point).absolute())
    (Path(config.run) / LIST).write_text("".join(f"{path}\n" for path in paths))


def train_points(config: ScalingConfig) -> int:
    """Train the models one after another, or the one that `config.task` names.

    Finished ones are skipped, half-done ones resume, and one that fails is named at the end and stops no other.

    Returns:
        OK, FAILED if one failed, or STOPPED as soon as one was asked to stop.

    Raises:
        UserError: if there is no model of this number, or what they share is not there.
    """
    planned = points(config)
    if config.task >= len(planned):
        raise UserError(f"task={config.task} is none of the {len(planned)} models: give 0 to {len(planned) - 1}.")
    _require_prepared(config)
    failed = []
    for number, point in enumerate(planned):
        if config.task not in (-1, number):
            continue
        print(f"model {number} of {len(planned)}: {point.name}", flush=True)
        code = run_stages(experiment(config, point), MODEL)
        if code == ExitCode.STOPPED:
            return code
        if code:
            failed.append(f"{point.name} (exit code {code})")
    if failed:
        print(f"failed, run again to retry: {', '.join(failed)}", file=sys.stderr)
    return ExitCode.FAILED if failed else ExitCode.OK


def _require_prepared(config: ScalingConfig) -> None:
    shared = shared_experiment(config).paths.tokens
    for store in (shared, *(family_experiment(config, k).paths.chunks for k in config.grid.k)):
        if not (store / MANIFEST).exists():
            raise UserError(f"{store} is not there yet: make it by `scaling_laws.py prepare`.")
