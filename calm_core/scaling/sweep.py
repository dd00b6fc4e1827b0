"""Runs a study: first what the models share, then every model, each an ordinary experiment in its own folder."""

import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from calm_core import config as configuration
from calm_core.cluster.launcher import Launcher
from calm_core.config.experiment import Experiment
from calm_core.config.scaling_config import ScalingConfig
from calm_core.errors import ExitCode, UserError
from calm_core.io import MANIFEST, write_text
from calm_core.scaling.points import Point, base_path, experiment, family_experiment, points, shared_experiment
from calm_core.scaling.results import require_as_planned
from calm_core.workflow.stages import ROOT, config_path, run_stages

SHARED = ("train_tokenizer", "tokenize_corpus")

FAMILY = ("train_autoencoder", "evaluate_autoencoder", "build_chunks")

MODEL = ("train_calm",)

LIST = "models.txt"

LAUNCHER = ROOT / "launchers" / "sweep.slurm"

AT_ONCE = 4  # tasks of the array


def prepare(config: ScalingConfig) -> int:
    """Make what the models share: tokenizer, tokens, and the autoencoder and chunks of each K. Finished stages are
    skipped.

    Writes the configuration of every model, and their list, RUN/models.txt, for an array of jobs. A K that fails does
    not stop the others and is named at the end.

    Returns:
        OK, FAILED if a K failed, STOPPED as soon as one was asked to stop; or the exit code of tokenizer and tokens.

    Raises:
        UserError: if a model or an autoencoder has been trained by other settings.
    """
    if code := _prepare_tokens(config):
        return code
    failed = _prepare_families(config)
    print(f"for an array of jobs: {array_command(config)}")
    return _ending(failed)


def run(config: ScalingConfig) -> int:
    """Prepare and train the models one after another; or train the one that `config.task` selects, already prepared.

    Finished models are skipped, interrupted ones resume. A model that fails does not stop the others and is named at
    the end; the models of a K that cannot be prepared are skipped and named.

    Returns:
        OK, FAILED if anything failed, STOPPED as soon as one was asked to stop; or the exit code of tokenizer and
        tokens, which all need.

    Raises:
        UserError: if there is no model of this number, if what it needs is not there, or if a model or an autoencoder
            has been trained by other settings.
    """
    planned = points(config)
    if config.task >= len(planned):
        raise UserError(f"task={config.task} is not one of the {len(planned)} models: give 0 to {len(planned) - 1}.")
    if config.task >= 0:
        chosen = planned[config.task]
        require_as_planned(config, [chosen])
        _require_prepared(experiment(config, chosen))
        return _ending(_train(config, [chosen]))
    if code := _prepare_tokens(config):
        return code
    unprepared = _prepare_families(config)
    if ExitCode.STOPPED in unprepared.values():
        return _ending(unprepared)
    failed = _train(config, [point for point in planned if point.family not in unprepared])
    return _ending({**unprepared, **failed}, [point.name for point in planned if point.family in unprepared])


def array_command(config: ScalingConfig) -> str:
    """The sbatch command that trains the listed models as an array of jobs, each on the configured number of ranks."""
    ranks, here = config.base.pipeline.processes, Launcher.read(LAUNCHER)
    nodes, rest = divmod(ranks, here.tasks)
    size = [f"--ntasks-per-node={ranks}", f"--gpus-per-node={ranks}"] if rest else [f"--nodes={nodes}"]
    words = [f"--array=1-{len(points(config))}%{AT_ONCE}", *([] if ranks == here.nodes * here.tasks else size)]
    return f"sbatch {' '.join(words)} {LAUNCHER.relative_to(ROOT)} {Path(config.run) / LIST}"


def _prepare_tokens(config: ScalingConfig) -> int:
    require_as_planned(config, points(config))
    Path(config.run).mkdir(parents=True, exist_ok=True)
    configuration.save(config.base, base_path(config))
    return run_stages(shared_experiment(config), SHARED)


def _prepare_families(config: ScalingConfig) -> dict[str, int]:
    failed = _each({f"k{k}": family_experiment(config, k) for k in config.grid.k}, FAMILY)
    _write_list(config, failed)
    return failed


def _write_list(config: ScalingConfig, unprepared: Collection[str]) -> None:
    """One configuration per line; a model that cannot be trained yet is a comment, so that line numbers stay."""
    lines = []
    for point in points(config):
        of_point = experiment(config, point)
        Path(of_point.run).mkdir(parents=True, exist_ok=True)
        configuration.save(of_point, config_path(of_point))
        ready = point.family not in unprepared
        lines.append(f"{'' if ready else '# not prepared: '}{config_path(of_point).absolute()}\n")
    write_text(Path(config.run) / LIST, "".join(lines))


def _train(config: ScalingConfig, chosen: Iterable[Point]) -> dict[str, int]:
    return _each({point.name: experiment(config, point) for point in chosen}, MODEL)


def _each(parts: Mapping[str, Experiment], names: Collection[str]) -> dict[str, int]:
    """Run the named stages of each experiment until one is stopped on request; the exit codes of those that fail."""
    failed = {}
    for number, (name, part) in enumerate(parts.items(), 1):
        print(f"{name}: {number} of {len(parts)}", flush=True)
        if code := run_stages(part, names):
            failed[name] = code
        if code == ExitCode.STOPPED:
            break
    return failed


def _ending(failed: Mapping[str, int], left_out: Collection[str] = ()) -> int:
    """Print what failed and what was not trained; the exit code."""
    failures = [f"{name} (exit code {code})" for name, code in failed.items() if code != ExitCode.STOPPED]
    if failures:
        print(f"failed, run again to retry: {', '.join(failures)}", file=sys.stderr)
    if left_out:
        print(f"not trained, as their autoencoder or chunks failed: {', '.join(left_out)}", file=sys.stderr)
    if ExitCode.STOPPED in failed.values():
        return ExitCode.STOPPED
    return ExitCode.FAILED if failed else ExitCode.OK


def _require_prepared(model: Experiment) -> None:
    paths = model.paths
    needed = [paths.tokens]
    if not model.head.reads_tokens:
        needed = [paths.autoencoder, paths.tokens if model.data.latents == "encode" else paths.chunks]
    for made in needed:
        if not (made / MANIFEST).exists():
            raise UserError(f"{made} is not there yet: make it by `scaling_laws.py prepare`.")
