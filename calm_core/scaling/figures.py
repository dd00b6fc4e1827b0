"""The figures of a study, as PNG and SVG files below RUN/figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from calm_core.config.scaling_config import ScalingConfig
from calm_core.errors import UserError
from calm_core.io import read_json, replacing
from calm_core.report.curves import style
from calm_core.scaling.analysis import law_curve
from calm_core.scaling.law_report import LAWS
from calm_core.scaling.points import BASELINE, families
from calm_core.scaling.results import Row, read_results, results_path

# The paper's models (its table 1): training FLOPs and BrierLM on WikiText-103, CALM at K=4.
PUBLISHED = {
    "Transformer (paper)": ([6.6e20, 11.9e20, 22.5e20], [6.05, 7.07, 8.98]),
    "CALM K=4 (paper)": ([3.7e20, 7.7e20, 19.5e20], [5.72, 6.58, 8.53]),
}

TITLES = {"cross_entropy": "cross-entropy, nats a token", "brier_lm": "BrierLM"}


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
        if known:
            drawn += _save(_performance(config, known, laws[measure], measure), folder / f"compute_{measure}")
            drawn += _save(_isoflop(config, known, measure), folder / f"isoflop_{measure}")
            drawn += _save(_equal_compute(config, known, measure), folder / f"k_{measure}")
    return drawn


def _performance(config: ScalingConfig, rows: list[Row], laws: Mapping[str, Any], measure: str) -> Figure:
    """Performance against training compute: every point, the law of each family, published models beside."""
    figure, axes = _axes(f"{measure_title(measure)} against training compute", "training FLOPs", measure_title(measure))
    axes.set_xscale("log")
    for number, family in enumerate(families(config)):
        own = of_family(rows, family)
        if not own:
            continue
        color = f"C{number}"
        axes.errorbar(*_columns(own, measure), fmt="o", color=color, alpha=0.5, markersize=4, label=family_name(family))
        if (curve := law_curve(laws["compute"][family], measure, [row["flops"] for row in own])) is not None:
            axes.plot(*curve, color=color)
    if measure == "brier_lm":
        for (name, (compute, score)), marker in zip(PUBLISHED.items(), ("s", "D"), strict=True):
            axes.plot(compute, score, marker=marker, color="tab:gray", linestyle="--", label=name)
    axes.legend(frameon=False)
    return figure


def _isoflop(config: ScalingConfig, rows: list[Row], measure: str) -> Figure:
    """The measure against size, a curve for each budget; a panel for each family."""
    shown = [family for family in families(config) if any(row["family"] == family for row in rows)]
    figure = Figure(figsize=(4.5 * len(shown), 4), layout="constrained")
    for family, axes in zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
        style(axes, family_name(family), "N, parameters without token tables", measure_title(measure))
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        own = of_family(rows, family)
        for budget in sorted({row["budget"] for row in own}):
            at = sorted((row for row in own if row["budget"] == budget), key=lambda row: row["size"])
            flops = np.mean([row["flops"] for row in at])
            values, errors = ([row[name] for row in at] for name in (measure, f"{measure}_error"))
            axes.errorbar([row["size"] for row in at], values, errors, marker="o", label=f"{flops:.2g} FLOPs")
        axes.legend(frameon=False)
    return figure


def _equal_compute(config: ScalingConfig, rows: list[Row], measure: str) -> Figure:
    """The best model of each K at each budget; the AR baseline is drawn as K=1 with a square."""
    figure, axes = _axes(
        f"{measure_title(measure)} over K at equal compute", "K, tokens per chunk", measure_title(measure)
    )
    axes.set_xscale("log", base=2)
    for number, budget in enumerate(sorted({row["budget"] for row in rows})):
        best = best_of_families(config, rows, budget, measure)
        calm = sorted((row for f, row in best.items() if f != BASELINE), key=lambda row: row["k"])
        label = f"{np.mean([row['flops'] for row in best.values()]):.2g} FLOPs"
        axes.errorbar([row["k"] for row in calm], *_values(calm, measure), marker="o", color=f"C{number}", label=label)
        if BASELINE in best:
            axes.errorbar([1], *_values([best[BASELINE]], measure), marker="s", color=f"C{number}")
    axes.legend(frameon=False)
    return figure


def _columns(rows: list[Row], measure: str) -> tuple[list[float], list[float], list[float]]:
    return ([row["flops"] for row in rows], *_values(rows, measure))


def _values(rows: list[Row], measure: str) -> tuple[list[float], list[float]]:
    return [row[measure] for row in rows], [row[f"{measure}_error"] or 0.0 for row in rows]


def of_family(rows: list[Row], family: str) -> list[Row]:
    """The rows of one family."""
    return [row for row in rows if row["family"] == family]


def best_of_families(config: ScalingConfig, rows: list[Row], budget: int, measure: str) -> dict[str, Row]:
    """The best model of each family at one budget; families without a point there are left out."""
    sign = 1 if measure == "cross_entropy" else -1
    at = [row for row in rows if row["budget"] == budget]
    return {f: min(own, key=lambda row: sign * row[measure]) for f in families(config) if (own := of_family(at, f))}


def family_name(family: str) -> str:
    """How figures call a family."""
    return "AR" if family == BASELINE else f"CALM K={family.removeprefix('k')}"


def measure_title(measure: str) -> str:
    """How figures call a measure."""
    return TITLES.get(measure, f"Brier-{measure[-1]}")


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    style(axes, title, xlabel, ylabel)
    return figure, axes


def _save(figure: Figure, path: Path) -> list[Path]:
    paths = [path.with_suffix(f".{kind}") for kind in ("png", "svg")]
    for target in paths:
        with replacing(target) as temporary:
            figure.savefig(temporary, format=target.suffix[1:], dpi=120)
    return paths
