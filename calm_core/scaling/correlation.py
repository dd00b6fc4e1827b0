"""Does BrierLM rank models as their likelihood does? Autoregressive models know both (paper, section 4)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from calm_core.config.experiment import Experiment
from calm_core.config.scaling_config import CorrelationConfig
from calm_core.evaluation.tables import table
from calm_core.io import write_json
from calm_core.report.figure import plot_correlation
from calm_core.training.run_log import read_metrics
from calm_core.workflow.stages import run_stages

MEASURES = ("brier_lm", "brier_1", "brier_2", "brier_3", "brier_4")

Point = dict[str, Any]


def shared_experiment(config: CorrelationConfig) -> Experiment:
    """What the models share: tokenizer and tokens."""
    return replace(config.base, run=str(Path(config.run) / "shared"))


def experiment(config: CorrelationConfig, width: int) -> Experiment:
    """The experiment that trains the model of one width."""
    base, shared = config.base, shared_experiment(config).paths
    ffn = max(1, round(base.model.ffn * width / base.model.hidden))
    return replace(
        base,
        run=str(Path(config.run) / f"width-{width}"),
        data=replace(base.data, tokenizer=str(shared.tokenizer), tokens=str(shared.tokens)),
        model=replace(base.model, hidden=width, ffn=ffn),
        head=replace(base.head, kind="softmax"),
        training=replace(base.training, milestones=config.steps[:-1], eval_every=0),
    )


def train(config: CorrelationConfig) -> int:
    """Train and score the models, each in its own folder; finished ones are skipped, interrupted ones resume.

    Returns:
        The exit code of the first stage that fails, or OK.
    """
    experiments = [experiment(config, width) for width in config.widths]  # bad widths are known before any work
    return run_stages(shared_experiment(config), ("train_tokenizer", "tokenize_corpus")) or next(
        (code for one in experiments if (code := run_stages(one, ("train_calm",)))), 0
    )


def points(config: CorrelationConfig) -> list[Point]:
    """Width, step, cross-entropy in nats and Brier scores of every evaluation that there is."""
    return [
        {"width": width, "step": record["step"], "cross_entropy": record["loss"]}
        | {f"{name}{e}": record[f"{name}{e}"] for name in MEASURES for e in ("", "_error")}
        | {"reason": record["brier_lm_reason"], "measure": record["measure"]}
        | {"standard_errors": record.get("standard_errors")}
        for width in config.widths
        for record in read_metrics(experiment(config, width).paths.calm_run / "metrics.jsonl", "eval")
    ]


def correlations(points: Sequence[Point], name: str) -> dict[str, Any]:
    """Correlation of a measure with the cross-entropy over the points that have both, and their number.

    `pearson` is the paper's figure. Since BrierLM falls nearly exponentially in the cross-entropy, a straight line fits
    it over a narrow range of models alone: `pearson_of_log` and `spearman`, r of the ranks, hold over a wide one. None
    with fewer than three points, where one of the two does not vary, or of a logarithm that is not defined.
    """
    pairs = [(point[name], point["cross_entropy"]) for point in points]
    pairs = [pair for pair in pairs if None not in pair]
    measure, entropy = np.array(pairs).reshape(-1, 2).T
    ranks = [values.argsort().argsort() for values in (measure, entropy)]
    plain = _pearson(measure, entropy)
    return {
        "pearson": plain,
        "pearson_of_log": _pearson(np.log(measure), entropy) if (measure > 0).all() else None,
        "spearman": None if plain is None else _pearson(*ranks),
        "points": len(pairs),
    }


def later_half(points: Sequence[Point]) -> list[Point]:
    """The later half of each model's evaluations, since the paper's models are trained further than these begin."""
    models: dict[int, list[Point]] = {}
    for point in sorted(points, key=lambda point: point["step"]):
        models.setdefault(point["width"], []).append(point)
    return [point for model in models.values() for point in model[len(model) // 2 :]]


def _pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 2 and np.ptp(x) and np.ptp(y) else None


def report(config: CorrelationConfig) -> str:
    """Write RUN/correlation.json and RUN/correlation.png, and return the result as text."""
    found, run = points(config), Path(config.run)
    named = {name: correlations(found, name) for name in MEASURES}
    named["brier_lm, later half"] = correlations(later_half(found), "brier_lm")
    write_json(run / "correlation.json", {"correlations": named, "evaluations": len(found), "points": found})
    plot_correlation(found, named["brier_lm"]["pearson"], run / "correlation.png")
    kinds = ("pearson", "pearson_of_log", "spearman")
    rows = [
        [name, *("none" if of[kind] is None else f"{of[kind]:.3f}" for kind in kinds), f"{of['points']}"]
        for name, of in named.items()
    ]
    lines = table(["against cross-entropy", "Pearson r", "r of its log", "r of ranks", "points"], rows)
    if missing := len(found) - named["brier_lm"]["points"]:
        lines.append(f"{missing} evaluations have no BrierLM: one of Brier-1..4 was not significant there")
    return "\n".join([*lines, f"finished: {run / 'correlation.json'}, {run / 'correlation.png'}"])
