"""The summary of an experiment: every number read from an artefact, none computed anew."""

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from calm_core import config as configuration
from calm_core.config.experiment import Experiment
from calm_core.evaluation.tables import table
from calm_core.io import hash_bytes, read_json, write_json
from calm_core.report.curves import plot_brier, plot_loss
from calm_core.training.run_log import read_metrics

PACKAGES = ("torch", "megatron-core", "deepspeed")


def write_summary(experiment: Experiment) -> dict[str, Any]:
    """Write RUN/summary.json from what the stages left, and return it.

    `tokens_per_second` is the median over the lines of a training's metrics.jsonl; standard errors are clustered by
    document; `seconds` count every attempt of a stage.
    """
    run, paths, trainings = Path(experiment.run), experiment.paths, _trainings(experiment)
    scored = read_json(paths.calm_run / "evaluation.json")
    depth = sum(f"brier_{n}" in scored for n in range(1, 5))
    summary = {
        "head": experiment.head.kind,
        **({} if experiment.head.reads_tokens else {"autoencoder": _rebuilt(paths.autoencoder_run)}),
        "calm": {
            "brier": [_with_error(scored, f"brier_{n}") for n in range(1, depth + 1)],
            "brier_lm": scored["brier_lm"],
            "brier_lm_reason": scored["brier_lm_reason"],
            "measure": scored["measure"],
            "unigram_brier": [scored[f"unigram_brier_{n}"] for n in range(1, depth + 1)],
            "bigram_brier": [scored[f"bigram_brier_{n}"] for n in range(1, depth + 1)],
            "collision": scored["collision_1"],
            "loss": _with_error(scored, "loss"),
            "loss_shuffled": _with_error(scored, "loss_shuffled"),
        },
        "tokens_per_second": {name: _tokens_per_second(folder) for name, folder in trainings.items()},
        "seconds": {name: stage["seconds"] for name, stage in read_json(run / "stages.json").items()},
        "samples": [
            {name: sample[name] for name in ("temperature", "prompt", "text")}
            for sample in read_json(run / "samples.json")
        ],
        "machine": _machine(paths.calm_run),
        "config_hash": hash_bytes(configuration.to_yaml(experiment).encode()),
    }
    write_json(run / "summary.json", summary)
    return summary


def plot_experiment(experiment: Experiment) -> None:
    """Loss curves of all trainings, and Brier-1 and 2 of the model, as PNG files in their run folders."""
    titles = {"autoencoder": "Autoencoder", "calm": _model_name(experiment.head.reads_tokens)}
    for name, folder in _trainings(experiment).items():
        train, evaluations = (read_metrics(folder / "metrics.jsonl", kind) for kind in ("train", "eval"))
        plot_loss(train, evaluations, f"{titles[name]}: loss", folder / "loss.png")
    plot_brier(evaluations, experiment.paths.calm_run / "brier.png")


def format_summary(summary: Mapping[str, Any]) -> str:
    """The summary for a terminal: a table of figures, the time of each stage, and the samples."""
    autoencoder, calm = summary.get("autoencoder", {}), summary["calm"]
    model = _model_name(reads_tokens=not autoencoder)
    figures = [[f"autoencoder {name.replace('_', ' ')}", f"{value:.4g}"] for name, value in autoencoder.items()]
    for n, (own, unigram) in enumerate(zip(calm["brier"], calm["unigram_brier"], strict=True), 1):
        figures.append([f"{model} Brier-{n} (unigram)", f"{_shown(own, '.3%')} ({unigram:.3%})"])
    lm = calm["brier_lm"]
    figures += [
        [calm["measure"], "none" if lm is None else f"{lm:.3f}"],
        [f"{model} held-out loss", _shown(calm["loss"], ".4f")],
        *([f"{name} tokens/s", f"{speed:,.0f}"] for name, speed in summary["tokens_per_second"].items()),
        *([f"seconds of {name}", f"{seconds:.0f}"] for name, seconds in summary["seconds"].items()),
    ]
    samples = [
        f'-- temperature {sample["temperature"]:g}, prompt "{sample["prompt"]}"\n{sample["prompt"]}{sample["text"]}'
        for sample in summary["samples"]
    ]
    return "\n".join([*table(["figure", "value"], figures), "", *samples])


def _trainings(experiment: Experiment) -> dict[str, Path]:
    """The run folder of each training: none of an autoencoder that is not needed or was given."""
    paths = experiment.paths
    needed = not experiment.head.reads_tokens and not experiment.data.autoencoder
    return {**({"autoencoder": paths.autoencoder_run} if needed else {}), "calm": paths.calm_run}


def _model_name(reads_tokens: bool) -> str:
    return "AR" if reads_tokens else "CALM"


def _rebuilt(autoencoder_run: Path) -> dict[str, float]:
    health = read_json(autoencoder_run / "evaluation.json")
    return {
        "token_accuracy": health["token_accuracy"],
        "token_accuracy_posterior": health["token_accuracy_posterior"],
        f"token_accuracy_sigma_{health['sigma']}": health["token_accuracy_noisy"],
        "mean_sigma": health["mean_sigma"],
        "dead_dimensions": health["dead_dimensions"],
    }


def _with_error(result: Mapping[str, Any], name: str) -> dict[str, float | None]:
    return {"value": result[name], "standard_error": result[f"{name}_error"]}


def _shown(measured: Mapping[str, float | None], form: str) -> str:
    error = measured["standard_error"]
    return f"{measured['value']:{form}}" + (f" ± {error:{form}}" if error is not None else "")


def _tokens_per_second(folder: Path) -> float | None:
    speeds = [record["tokens_per_second"] for record in read_metrics(folder / "metrics.jsonl", "train")]
    return median(speeds) if speeds else None


def _machine(calm_run: Path) -> dict[str, Any]:
    starts = [e for e in read_metrics(calm_run / "metrics.jsonl", "event") if e["event"] == "start"]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "ranks": starts[-1]["ranks"],
        "precision": starts[-1]["precision"],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }
