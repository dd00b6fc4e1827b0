"""What the runs of a study measured: one row a model and budget, kept in one parquet file."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from calm_core import flops
from calm_core.data.manifest import replacing
from calm_core.errors import UserError
from calm_core.scaling.config import ScalingConfig
from calm_core.scaling.plan import autoencoder_flops
from calm_core.scaling.points import Point, experiment, points
from calm_core.training.run_log import read_metrics

MEASURES = ("brier_1", "brier_2", "brier_3", "brier_4", "brier_lm", "loss")

Row = dict[str, Any]


def collect(config: ScalingConfig) -> list[Row]:
    """A row for each model and budget that has been reached, from the evaluations in the runs' metrics.

    flops are of training in the paper's accounting, without the autoencoder, whose FLOPs (spent once for all models of
    a K) are a column of their own. A measure that a model does not have is None.
    """
    rows = []
    for point in points(config):
        metrics = experiment(config, point).paths.calm_run / "metrics.jsonl"
        evaluations = {record["step"]: record for record in read_metrics(metrics, "eval")}
        spent = 0.0 if point.shape.head.reads_tokens else autoencoder_flops(config, point.k)
        for budget, step in enumerate(point.budget_steps):
            if step in evaluations:
                rows.append(_row(point, budget, step, spent, evaluations[step]))
    return rows


def results_path(config: ScalingConfig) -> Path:
    """Where the results of a study are kept."""
    return Path(config.run) / "results.parquet"


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
    return pq.read_table(path).to_pylist()


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
    likelihood = point.shape.head.reads_tokens
    row["cross_entropy"], row["cross_entropy_error"] = (row["loss"], row["loss_error"]) if likelihood else (None, None)
    return row
