"""The page of a scaling study: its points and laws, to zoom into and hover over."""

from pathlib import Path
from typing import Any

from calm_core.config.scaling_config import ScalingConfig
from calm_core.io import read_json
from calm_core.report.figure import Figure
from calm_core.report.page import Section, Table, Text, write_page
from calm_core.scaling.figures import compute_figure, equal_compute_figure, isoflop_figures, measure_title
from calm_core.scaling.law_report import LAWS, laws_text, parameter_text
from calm_core.scaling.results import MEASURES, Row, read_results, results_path
from calm_core.scaling.study_plan import plan_table

ABOUT = {
    "floor": "the loss that remains at unlimited compute",
    "exponent": "the loss above the floor falls as compute to minus this power",
    "alpha": "the part of the loss due to size falls as N to minus this power",
    "beta": "the part of the loss due to data falls as D to minus this power",
    "a": "the part of the loss due to size at the reference size",
    "b": "the part of the loss due to data at the reference number of tokens",
    "k_exponent": "the loss above the floor grows as K to this power",
    "scatter": "standard deviation of the losses about the law, in their standard errors",
    "undetermined": "parameters at a bound of the fit",
}


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
    note = f"Intervals are of {config.fit.confidence:.0%}; their coverage is measured in docs/scaling."
    sections += [
        Section("Laws", [Text(note, True), *_law_tables(laws)]),
        Section("Laws in full", [Text(laws_text(laws))], folded=True),
        Section("Plan", [Text(plan_table(config))], folded=True),
        Section("Points", [_points(rows)], folded=True),
    ]
    page = Path(config.run) / "report.html"
    write_page(page, f"Scaling laws: {Path(config.run).name}", sections)
    return page


def _figures(config: ScalingConfig, rows: list[Row], laws: dict[str, Any], measure: str) -> list[Figure]:
    return [
        compute_figure(config, rows, laws, measure),
        *isoflop_figures(config, rows, measure),
        equal_compute_figure(config, rows, measure),
    ]


def _law_tables(laws: dict[str, Any]) -> list[Table]:
    """The parameters of the laws over compute and of the joint laws, with their intervals."""
    forms = {
        "compute": ("loss against compute", ["floor", "scale", "exponent"]),
        "joint": ("loss against N, D and K", ["floor", "a", "alpha", "b", "beta", "k_exponent"]),
    }
    tables = []
    for form, (title, names) in forms.items():
        rows = [
            [
                measure_title(measure),
                name,
                *(parameter_text(law["parameters"][parameter]) for parameter in names),
                f"{law['scatter']:.2g}",
                ", ".join(law["undetermined"]),
            ]
            for measure, of_measure in laws.items()
            for name, law in of_measure[form].items()
            if "missing" not in law
        ]
        head = [title, "models", *names, "scatter", "undetermined"]
        tables += [Table(head, rows, about=ABOUT)] if rows else []
    return tables


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
