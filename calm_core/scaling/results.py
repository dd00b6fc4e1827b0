"""What the runs of a study measured: one row per model and budget, in one parquet file."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from calm_core import config as configuration
from calm_core.config.experiment import Experiment
from calm_core.config.scaling_config import ScalingConfig
from calm_core.errors import UserError
from calm_core.io import replacing
from calm_core.plan import flops
from calm_core.scaling.points import Point, autoencoder_flops, experiment, family_experiment, points
from calm_core.training.run_log import RunFolder, read_metrics

LAWS = "laws.json"  # in the folder of the study

MEASURES = ("brier_1", "brier_2", "brier_3", "brier_4", "brier_lm", "loss")

# The sections of a configuration that decide the result of a training, by what the model is.
TOKENS = ("seed", "data", "tokenizer", "model", "training", "evaluation")

LATENTS = (*TOKENS, "head")

AUTOENCODER = ("seed", "data", "tokenizer", "autoencoder", "autoencoder_training")

# K is in the model's name, and a training at a constant rate may be longer.
SET_BY_THE_STUDY = ("data.k", "training.steps")

Row = dict[str, Any]


def collect(config: ScalingConfig) -> list[Row]:
    """A row for each model and each budget it has reached, from the evaluations in the runs' metrics.

    flops are of training (see `flops_per_token`), without the autoencoder, whose FLOPs (spent once for all models of a
    K) are a column of their own. A measure that a model does not have is None.

    Raises:
        UserError: if a model or an autoencoder was trained by other settings than the study's, or models were scored
            under measures that cannot be compared.
    """
    rows, planned = [], points(config)
    require_as_planned(config, planned)
    for point in planned:
        metrics = experiment(config, point).paths.calm_run / "metrics.jsonl"
        evaluations = {record["step"]: record for record in read_metrics(metrics, "eval")}
        spent = 0.0 if point.shape.head.reads_tokens else autoencoder_flops(config, point.k)
        for budget, step in enumerate(point.budget_steps):
            if step in evaluations:
                rows.append(_row(point, budget, step, spent, evaluations[step]))
    _require_comparable(rows)
    return rows


def require_as_planned(config: ScalingConfig, chosen: Collection[Point]) -> None:
    """Refuse these models and their autoencoders if they were trained by other settings than the study's.

    A run resumes under another learning rate or batch, so it would not refuse these itself.

    Raises:
        UserError: naming the first model, its setting, and what to change.
    """
    for k in sorted({point.k for point in chosen if not point.shape.head.reads_tokens}):
        planned = family_experiment(config, k)
        _require_same(f"the autoencoder of K={k}", planned.paths.autoencoder_run, planned, AUTOENCODER)
    for point in chosen:
        planned = experiment(config, point)
        sections = TOKENS if point.shape.head.reads_tokens else LATENTS
        _require_same(point.name, planned.paths.calm_run, planned, sections)


def _require_same(name: str, folder: Path, planned: Experiment, sections: Collection[str]) -> None:
    run = RunFolder(folder)
    if not run.metrics.exists():
        return
    chunks = () if sections is TOKENS else ("chunks",)
    compared = (configuration.load(Experiment, run.config, []), planned)
    saved, wanted = (configuration.to_dict(configuration.with_absolute_paths(one)) for one in compared)
    for key, old, new in configuration.differences(saved, wanted):
        if key.partition(".")[0] not in sections or key in SET_BY_THE_STUDY:
            continue
        if configuration.decides(Experiment, key, "weights", "training", "data", "scores", *chunks):
            raise UserError(
                f"{name} was trained with {key}={old}, and the study now gives {new}: restore it, or move {folder} "
                "away and run again."
            )


def _require_comparable(rows: list[Row]) -> None:
    for row in rows:
        if row["measure"] != rows[0]["measure"]:
            raise UserError(
                f"{row['model']} was scored as {row['measure']} and {rows[0]['model']} as {rows[0]['measure']}, which "
                "cannot be compared: move the folder of the one that differs away and run again."
            )


def results_path(config: ScalingConfig) -> Path:
    """Where the results of a study are kept."""
    return Path(config.run) / "results.parquet"


def with_stored(config: ScalingConfig, rows: list[Row]) -> tuple[list[Row], int]:
    """The rows with those of the results file whose runs are no longer there, and the number of these.

    So a results file never loses a point.

    Raises:
        UserError: if the file holds points that the study does not plan, or scores that cannot be compared.
    """
    path = results_path(config)
    found = {(row["model"], row["budget"]) for row in rows}
    kept = [row for row in read_results(path) if (row["model"], row["budget"]) not in found] if path.exists() else []
    planned = {
        (point.name, budget): (step, point.size)
        for point in points(config)
        for budget, step in enumerate(point.budget_steps)
    }
    for row in kept:
        if planned.get((row["model"], row["budget"])) != (row["step"], row["size"]):
            raise UserError(
                f"{path} holds {row['model']} at step {row['step']}, which this study does not plan: "
                "restore the study's settings, or move the file away and run again."
            )
    _require_comparable([*rows, *kept])
    return [*rows, *kept], len(kept)


def write_results(rows: list[Row], path: Path) -> None:
    """Write the rows as parquet, whole or not at all."""
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)


def read_results(path: Path) -> list[Row]:
    """The rows of a results file.

    Raises:
        UserError: if there is none.
    """
    if not path.exists():
        raise UserError(f"{path} is not there yet: run `scaling_laws.py fit` on this study first.")
    return [{"interval_factor": None, **row} for row in pq.read_table(path).to_pylist()]  # older files have none


def _row(point: Point, budget: int, step: int, autoencoder: float, evaluation: dict[str, Any]) -> Row:
    tokens = point.tokens(step)
    row: Row = {
        "model": point.name,
        "family": point.family,
        "k": point.k,
        "depth": point.depth,
        "seed": point.seed,
        "parameters": sum(flops.parameters(point.shape).values()),
        "size": point.size,
        "budget": budget,
        "measure": evaluation.get("measure"),
        "step": step,
        "tokens": tokens,
        "flops": point.training_flops(tokens),
        "executed_flops": flops.executed_training(point.shape, point.positions) * tokens / point.context,
        "autoencoder_flops": autoencoder,
    }
    for name in MEASURES:
        for key in (name, f"{name}_error"):
            value = evaluation.get(key)
            row[key] = None if value is None else float(value)
    row["interval_factor"] = (evaluation.get("standard_errors") or {}).get("interval_factor")
    likelihood = point.shape.head.reads_tokens
    row["cross_entropy"], row["cross_entropy_error"] = (row["loss"], row["loss_error"]) if likelihood else (None, None)
    return row
