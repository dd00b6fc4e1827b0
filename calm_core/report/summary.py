"""The summary of an experiment: every number is read from an artefact, none is computed again."""

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from calm_core import config as configuration
from calm_core.config.experiment import Experiment
from calm_core.evaluation.brier import half_interval
from calm_core.evaluation.tables import table
from calm_core.io import hash_bytes, read_json, write_json
from calm_core.report.figure import plot_brier, plot_loss
from calm_core.training.run_log import read_metrics
from calm_core.workflow.stages import stages

PACKAGES = ("torch", "megatron-core", "deepspeed")


def write_summary(experiment: Experiment) -> dict[str, Any]:
    """Write RUN/summary.json from what the stages left, and return it.

    `ar` is the baseline of the same training FLOPs, if the workflow has trained one; `words` the share of generated
    words that the training documents have, by model and temperature. `tokens_per_second` is the median over the lines
    of a training's metrics.jsonl; standard errors are clustered by document, or by generated text, and half of a 95 %
    interval is as many of them as Student's t asks for; `seconds` count every attempt of a stage.
    """
    run, paths, trainings = Path(experiment.run), experiment.paths, _trainings(experiment)
    models = {name: folder for name, folder in trainings.items() if name != "autoencoder"}
    summary = {
        "head": experiment.head.kind,
        **({} if experiment.head.reads_tokens else {"autoencoder": _rebuilt(paths.autoencoder_run)}),
        **{name: _scores(read_json(folder / "evaluation.json")) for name, folder in models.items()},
        "words": _words({name: folder.parent / "words.json" for name, folder in models.items()}),
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
    """Loss curves of all trainings, and Brier-1 and 2 of each model, as PNG files in their run folders.

    The evaluations in training have no bigram table; the curves show that of the full evaluation.
    """
    titles = {"autoencoder": "Autoencoder", "calm": _model_name(experiment.head.reads_tokens), "ar": "AR"}
    for name, folder in _trainings(experiment).items():
        train, evaluations = (read_metrics(folder / "metrics.jsonl", kind) for kind in ("train", "eval"))
        plot_loss(train, evaluations, f"{titles[name]}: loss", folder / "loss.png")
        if name != "autoencoder":
            scored = read_json(folder / "evaluation.json")
            bigram = {key: value for key, value in scored.items() if key.startswith("bigram_brier")}
            plot_brier([{**record, **bigram} for record in evaluations], folder / "brier.png")


def format_summary(summary: Mapping[str, Any]) -> str:
    """The summary for a terminal: scores of the models and baselines, other figures, and the samples."""
    autoencoder = summary.get("autoencoder", {})
    names = {"calm": _model_name(reads_tokens=not autoencoder), **({"ar": "AR"} if "ar" in summary else {})}
    figures = [[f"autoencoder {name.replace('_', ' ')}", f"{value:.4g}"] for name, value in autoencoder.items()]
    figures += [
        *([f"{shown} held-out loss", _shown(summary[name]["loss"], ".4f")] for name, shown in names.items()),
        *([f"{name} tokens/s", f"{speed:,.0f}"] for name, speed in summary["tokens_per_second"].items()),
        *([f"seconds of {name}", f"{seconds:.0f}"] for name, seconds in summary["seconds"].items()),
    ]
    samples = [
        f'-- temperature {sample["temperature"]:g}, prompt "{sample["prompt"]}"\n{sample["prompt"]}{sample["text"]}'
        for sample in summary["samples"]
    ]
    scores = table(["score", *names.values(), "bigram", "unigram"], _score_rows(summary, names))
    meaning = "±: half of a 95 % interval by Student's t, over held-out documents or generated texts"
    return "\n".join([*scores, meaning, "", *table(["figure", "value"], figures), "", *samples])


def _score_rows(summary: Mapping[str, Any], names: Iterable[str]) -> list[list[str]]:
    """A row for each score: of the models of these names, of the bigram table and of the unigram."""
    models = [summary[name] for name in names]
    baselines = [summary["calm"][f"{name}_brier"] for name in ("bigram", "unigram")]
    rows = [
        [
            f"Brier-{n}",
            *(_shown(model["brier"][n - 1], ".3%") for model in models),
            *(f"{scores[n - 1]:.3%}" for scores in baselines),
        ]
        for n in range(1, len(models[0]["brier"]) + 1)
    ]
    rows.append([models[0]["measure"], *(_shown(each, ".3f") for each in _brier_lm(models)), ""])
    for temperature, shares in summary["words"].items():
        cells = (_shown(shares[name], ".1%") for name in [*names, "bigram"])
        rows.append([f"words of the corpus at T={temperature}", *cells, ""])
    return rows


def _brier_lm(models: Sequence[Mapping[str, Any]]) -> list[dict[str, float | None]]:
    """BrierLM of the models, then of the bigram table."""
    own = [{"value": model["brier_lm"], "half_interval": model["brier_lm_half_interval"]} for model in models]
    return [*own, models[0]["bigram_brier_lm"]]


def _scores(scored: Mapping[str, Any]) -> dict[str, Any]:
    """What the summary has of a model's full evaluation."""
    depth = sum(f"brier_{n}" in scored for n in range(1, 5))
    return {
        "brier": [_with_error(scored, f"brier_{n}") for n in range(1, depth + 1)],
        "brier_lm": scored["brier_lm"],
        "brier_lm_error": scored["brier_lm_error"],
        "brier_lm_half_interval": half_interval(scored, "brier_lm"),
        "brier_lm_reason": scored["brier_lm_reason"],
        "measure": scored["measure"],
        "unigram_brier": [scored[f"unigram_brier_{n}"] for n in range(1, depth + 1)],
        "bigram_brier": [scored[f"bigram_brier_{n}"] for n in range(1, depth + 1)],
        "bigram_brier_lm": _with_error(scored, "bigram_brier_lm"),
        "collision": scored["collision_1"],
        "loss": _with_error(scored, "loss"),
        "loss_shuffled": _with_error(scored, "loss_shuffled"),
    }


def _words(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """The share of known words by temperature, then by model and for the bigram table; {} where none were counted."""
    counted = {name: read_json(path)["temperatures"] for name, path in files.items() if path.exists()}
    shares: dict[str, dict[str, Any]] = {}
    for name, records in counted.items():
        for record in records:
            of = shares.setdefault(f"{record['temperature']:g}", {"bigram": _as_figure(record["bigram"])})
            of[name] = _as_figure(record["model"])
    return shares


def _as_figure(share: Mapping[str, Any]) -> dict[str, Any]:
    return {"value": share["share"], **{name: share.get(name) for name in ("standard_error", "half_interval", "words")}}


def _trainings(experiment: Experiment) -> dict[str, Path]:
    """The run folder of each training: none of an autoencoder that is not needed or was given."""
    trained = {stage.name.removeprefix("train_"): stage.training for stage in stages(experiment) if not stage.given}
    return {name: training.folder for name, training in trained.items() if training}


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
    error, half = result.get(f"{name}_error"), half_interval(result, name)
    return {"value": result.get(name), "standard_error": error, "half_interval": half}


def _shown(measured: Mapping[str, float | None], form: str) -> str:
    if measured["value"] is None:
        return "none"
    half = measured["half_interval"]
    return f"{measured['value']:{form}}" + (f" ± {half:{form}}" if half is not None else "")


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
