"""The page of a scaling study: its points and laws, to zoom into and hover over."""

from pathlib import Path
from typing import Any

import numpy as np

from calm_core.config.scaling_config import ScalingConfig
from calm_core.io import read_json
from calm_core.report.page import Figure, Section, Table, Text, Trace, write_page
from calm_core.scaling.analysis import law_curve
from calm_core.scaling.figures import PUBLISHED, best_of_families, family_name, measure_title, of_family
from calm_core.scaling.law_report import LAWS, laws_text
from calm_core.scaling.points import BASELINE, families
from calm_core.scaling.results import MEASURES, Row, read_results, results_path
from calm_core.scaling.study_plan import plan_table


def write_scaling_page(config: ScalingConfig) -> Path:
    """Write RUN/report.html of a study whose laws are fitted; its path.

    Raises:
        UserError: if they are not.
    """
    rows = read_results(results_path(config))
    laws = read_json(Path(config.run) / LAWS)
    sections = [
        Section(
            measure_title(measure),
            _figures(config, known, laws[measure], measure) if known else [Text("No point has it.", True)],
        )
        for measure in config.fit.measures
        for known in [[row for row in rows if row[measure] is not None]]
    ]
    sections += [
        Section("Laws", [Text(laws_text(laws))]),
        Section("Plan", [Text(plan_table(config))]),
        Section("Points", [_points(rows)]),
    ]
    page = Path(config.run) / "report.html"
    write_page(page, f"Scaling laws: {Path(config.run).name}", sections)
    return page


def _figures(config: ScalingConfig, rows: list[Row], laws: dict[str, Any], measure: str) -> list[Figure]:
    title = measure_title(measure)
    compute = [_trace(of_family(rows, f), "flops", measure, family_name(f), line=False) for f in families(config)]
    for family in families(config):
        curve = law_curve(laws["compute"][family], measure, [row["flops"] for row in of_family(rows, family)])
        name = family_name(family)
        compute += [Trace(f"law of {name}", *(x.tolist() for x in curve), group=name)] if curve else []
    if measure == "brier_lm":
        compute += [Trace(name, *points, points=True) for name, points in PUBLISHED.items()]
    figures = [Figure(f"compute-{measure}", f"{title} against training FLOPs", "FLOPs", compute, log_x=True)]
    budgets = sorted({row["budget"] for row in rows})
    for family in families(config):
        own = of_family(rows, family)
        curves = [
            _trace(sorted(at, key=lambda row: row["size"]), "size", measure, f"{at[0]['flops']:.2g} FLOPs")
            for at in ([row for row in own if row["budget"] == budget] for budget in budgets)
            if at
        ]
        name = f"isoflop-{measure}-{family}"
        figures += (
            [Figure(name, f"{family_name(family)}: {title} at equal FLOPs", "N", curves, log_x=True)] if own else []
        )
    equal = []
    for budget in budgets:
        best = best_of_families(config, rows, budget, measure)
        calm = [row for family, row in best.items() if family != BASELINE]
        label = f"{np.mean([row['flops'] for row in best.values()]):.2g} FLOPs"
        equal += [_trace(calm, "k", measure, f"CALM, {label}")] if calm else []
        equal += [_trace([best[BASELINE]], "k", measure, f"AR, {label}")] if BASELINE in best else []
    return [*figures, Figure(f"k-{measure}", f"{title} over K at equal FLOPs", "K", equal, log_x=True)]


def _trace(rows: list[Row], x: str, measure: str, name: str, line: bool = True) -> Trace:
    """Points with two standard errors; hovering names the model."""
    ordered = sorted(rows, key=lambda row: row[x])
    errors = [2 * row[f"{measure}_error"] if row[f"{measure}_error"] else None for row in ordered]
    hover = [f"{row['model']}, {row['tokens']:,} tokens" for row in ordered]
    return Trace(
        name, [r[x] for r in ordered], [r[measure] for r in ordered], errors, points=True, line=line, text=hover
    )


def _points(rows: list[Row]) -> Table:
    head = ["model", "N", "tokens", "FLOPs", *MEASURES]
    return Table(
        head,
        [
            [
                row["model"],
                f"{row['size']:,}",
                f"{row['tokens']:,}",
                f"{row['flops']:.3g}",
                *(_measured(row, measure) for measure in MEASURES),
            ]
            for row in rows
        ],
    )


def _measured(row: dict[str, Any], measure: str) -> str:
    value, error = row[measure], row[f"{measure}_error"]
    return "" if value is None else f"{value:.4g}" + (f" ± {error:.2g}" if error else "")
