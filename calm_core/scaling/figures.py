"""The figures of a study: as PNG and SVG files below RUN/figures, and for its page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calm_core.config.scaling_config import ScalingConfig
from calm_core.errors import UserError
from calm_core.io import read_json
from calm_core.report.draw import draw
from calm_core.report.figure import GREY, Axis, Figure, Trace
from calm_core.scaling.analysis import law_curve
from calm_core.scaling.points import BASELINE, families
from calm_core.scaling.results import LAWS, Row, read_results, results_path

# The paper's models (its table 1): training FLOPs and BrierLM on WikiText-103, CALM at K=4.
PUBLISHED = {
    "Transformer (paper)": ([6.6e20, 11.9e20, 22.5e20], [6.05, 7.07, 8.98]),
    "CALM K=4 (paper)": ([3.7e20, 7.7e20, 19.5e20], [5.72, 6.58, 8.53]),
}

COMPUTE = Axis("training compute, FLOPs", log=10)

SIZE = Axis("N, parameters without token tables", log=10)

CHUNK = Axis("K, tokens per chunk (AR: 1)", log=2)


def draw_study(config: ScalingConfig) -> list[Path]:
    """Draw all figures of a study; their paths.

    Raises:
        UserError: if its results have not been collected yet.
    """
    rows = read_results(results_path(config))
    laws = read_json(Path(config.run) / LAWS)
    if not rows:
        raise UserError(f"{results_path(config)} holds no points: train the models first.")
    folder = Path(config.run) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for measure in config.fit.measures:
        known = [row for row in rows if row[measure] is not None]
        if not known:
            continue
        groups = {
            f"compute_{measure}": [compute_figure(config, known, laws[measure], measure)],
            f"isoflop_{measure}": isoflop_figures(config, known, measure),
            f"k_{measure}": [equal_compute_figure(config, known, measure)],
        }
        for name, figures in groups.items():
            paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
            draw(figures, *paths, width=4.5 if len(figures) > 1 else 6.5, height=4.5)
            drawn += paths
    return drawn


def compute_figure(config: ScalingConfig, rows: list[Row], laws: Mapping[str, Any], measure: str) -> Figure:
    """The measure against training compute: all points, the law of each family, and the paper's models."""
    traces = []
    for color, family in enumerate(families(config)):
        own, name = of_family(rows, family), family_name(family)
        if own:
            traces.append(_points(own, "flops", measure, name, color, line=False))
    for color, family in enumerate(families(config)):
        curve = law_curve(laws["compute"][family], measure, [row["flops"] for row in of_family(rows, family)])
        if curve:
            traces.append(Trace(f"law of {family_name(family)}", *(x.tolist() for x in curve), color=color))
    if measure == "brier_lm":
        traces += [
            Trace(name, *points, points=True, dashed=True, color=GREY - number)
            for number, (name, points) in enumerate(PUBLISHED.items())
        ]
    title = f"{measure_title(measure)} against training compute"
    return Figure(f"compute-{measure}", title, COMPUTE, traces, measure_axis(measure))


def isoflop_figures(config: ScalingConfig, rows: list[Row], measure: str) -> list[Figure]:
    """The measure against size for each family, a curve for each budget."""
    figures = []
    for family in families(config):
        own = of_family(rows, family)
        traces = [
            _points(at, "size", measure, f"{np.mean([row['flops'] for row in at]):.2g} FLOPs", budget)
            for budget in sorted({row["budget"] for row in own})
            for at in [[row for row in own if row["budget"] == budget]]
        ]
        title = f"{family_name(family)}: {measure_title(measure)} at equal compute"
        if own:
            figures.append(Figure(f"isoflop-{measure}-{family}", title, SIZE, traces, measure_axis(measure)))
    return figures


def equal_compute_figure(config: ScalingConfig, rows: list[Row], measure: str) -> Figure:
    """The best model of each K at each budget; the AR baseline stands at K=1."""
    traces = []
    for budget in sorted({row["budget"] for row in rows}):
        best = best_of_families(config, rows, budget, measure)
        calm = [row for family, row in best.items() if family != BASELINE]
        label = f"{np.mean([row['flops'] for row in best.values()]):.2g} FLOPs"
        traces += [_points(calm, "k", measure, f"CALM, {label}", budget)] if calm else []
        if BASELINE in best:
            traces.append(_points([best[BASELINE]], "k", measure, f"AR, {label}", budget, line=False))
    title = f"{measure_title(measure)} over K at equal compute"
    return Figure(f"k-{measure}", title, CHUNK, traces, measure_axis(measure))


def _points(rows: list[Row], x: str, measure: str, name: str, color: int, line: bool = True) -> Trace:
    """Points with two standard errors; hovering names the model."""
    ordered = sorted(rows, key=lambda row: row[x])
    errors = [2 * row[f"{measure}_error"] if row[f"{measure}_error"] else None for row in ordered]
    hover = [f"{row['model']}, {row['tokens']:,} tokens" for row in ordered]
    values = [row[x] for row in ordered], [row[measure] for row in ordered]
    return Trace(name, *values, errors, points=True, line=line, color=color, text=hover)


def of_family(rows: list[Row], family: str) -> list[Row]:
    """The rows of one family."""
    return [row for row in rows if row["family"] == family]


def best_of_families(config: ScalingConfig, rows: list[Row], budget: int, measure: str) -> dict[str, Row]:
    """The best model of each family at one budget; families without a point there are absent."""
    sign = 1 if measure == "cross_entropy" else -1
    at = [row for row in rows if row["budget"] == budget]
    return {f: min(own, key=lambda row: sign * row[measure]) for f in families(config) if (own := of_family(at, f))}


def family_name(family: str) -> str:
    """The name of a family in figures."""
    return "AR" if family == BASELINE else f"CALM K={family.removeprefix('k')}"


def measure_title(measure: str) -> str:
    """The name of a measure in figures."""
    return {"cross_entropy": "cross-entropy", "brier_lm": "BrierLM"}.get(measure, f"Brier-{measure[-1]}")


def measure_axis(measure: str) -> Axis:
    """The axis of a measure, with its unit."""
    if measure == "cross_entropy":
        return Axis("cross-entropy, nats per token")
    return Axis("BrierLM") if measure == "brier_lm" else Axis(f"{measure_title(measure)}, per cent", percent=True)
