"""Does BrierLM rank models as their likelihood does? Autoregressive models know both (paper, section 4)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calm_core.config import option
from calm_core.data.manifest import write_json
from calm_core.errors import UserError
from calm_core.evaluation.report import table
from calm_core.experiment import Experiment
from calm_core.pipeline.stages import run_stages
from calm_core.plots import plot_correlation
from calm_core.training.run_log import read_metrics

DEFAULT_CONFIG = Path(__file__).parents[2] / "configs" / "studies" / "brier_correlation.yaml"
MEASURES = ("brier_lm", "brier_1", "brier_2", "brier_3", "brier_4")

Point = dict[str, Any]


@dataclass(frozen=True)
class CorrelationConfig:
    """Autoregressive models of several widths, scored on the way through their training."""

    run: str = option("runs/brier_correlation", "folder of the experiment")
    widths: list[int] = option([32, 64, 128], "hidden sizes of the models; their feed-forward layers grow alike")
    evaluations: int = option(10, "evaluations of each model, at steps that grow geometrically")
    first: int = option(20, "step of the first one; the last is at base.training.steps")
    base: Experiment = option(Experiment, "what all models share; the head is softmax")

    def __post_init__(self) -> None:
        if not self.widths or self.evaluations < 2 or not 0 < self.first < self.base.training.steps:
            raise UserError(
                "brier_correlation wants at least one width, evaluations >= 2 and 0 < first < base.training.steps."
            )

    @property
    def steps(self) -> list[int]:
        """The steps after which each model is scored."""
        last = self.base.training.steps
        return sorted({round(step) for step in np.geomspace(self.first, last, self.evaluations).tolist()})


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
    """Train and score the models, each in its own folder; what is finished is skipped, what is begun goes on.

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
        for width in config.widths
        for record in read_metrics(experiment(config, width).paths.calm_run / "metrics.jsonl", "eval")
    ]


def correlation(points: Sequence[Point], name: str) -> tuple[float | None, int]:
    """Pearson's r of a measure and the cross-entropy over the points that have it, and how many these are.

    None with fewer than three points, or where one of the two does not vary.
    """
    pairs = np.array([(point[name], point["cross_entropy"]) for point in points if point[name] is not None])
    if len(pairs) < 3 or not pairs.std(axis=0).all():
        return None, len(pairs)
    return float(np.corrcoef(pairs.T)[0, 1]), len(pairs)


def report(config: CorrelationConfig) -> str:
    """Write RUN/correlation.json and RUN/correlation.png, and put the result in words."""
    found, run = points(config), Path(config.run)
    correlations = {name: correlation(found, name) for name in MEASURES}
    named = {name: {"pearson_r": r, "points": count} for name, (r, count) in correlations.items()}
    write_json(run / "correlation.json", {"correlations": named, "evaluations": len(found), "points": found})
    r, count = correlations["brier_lm"]
    plot_correlation(found, r, run / "correlation.png")
    rows = [
        [name, "none" if r is None else f"{r:.3f}", f"{count} of {len(found)}"]
        for name, (r, count) in correlations.items()
    ]
    lines = table(["measure", "Pearson r with cross-entropy", "points"], rows)
    if count < len(found):
        lines.append(f"{len(found) - count} evaluations have no BrierLM: one of Brier-1..4 was not significant there")
    return "\n".join([*lines, f"finished: {run / 'correlation.json'}, {run / 'correlation.png'}"])
