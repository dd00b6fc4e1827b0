"""The laws and figures of a study: RUN/laws.json, text for the terminal, files below RUN/figures, and a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calm_core.config.scaling_config import ScalingConfig
from calm_core.errors import UserError
from calm_core.evaluation.brier import half_interval
from calm_core.evaluation.tables import table
from calm_core.io import read_json, write_json
from calm_core.report.figure import GREY, Axis, Figure, Trace, draw
from calm_core.report.page import Paragraph, Section, Table, write_page
from calm_core.scaling.analysis import analyse, law_curve
from calm_core.scaling.points import BASELINE, families, plan_table, points
from calm_core.scaling.results import (
    LAWS,
    MEASURES,
    Row,
    collect,
    read_results,
    results_path,
    with_stored,
    write_results,
)

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

# The paper's models (its table 1): training FLOPs and BrierLM on WikiText-103, CALM at K=4.
PUBLISHED = {
    "Transformer (paper)": ([6.6e20, 11.9e20, 22.5e20], [6.05, 7.07, 8.98]),
    "CALM K=4 (paper)": ([3.7e20, 7.7e20, 19.5e20], [5.72, 6.58, 8.53]),
}

COMPUTE = Axis("training compute, FLOPs", log=10)

SIZE = Axis("N, parameters without token tables", log=10)

CHUNK = Axis("K, tokens per chunk (AR: 1)", log=2)


def fit_study(config: ScalingConfig, write: bool) -> str:
    """Collect the results of a study and fit its laws, as text; `write` also writes both to its folder.

    Points of RUN/results.parquet whose runs are no longer there are kept.
    """
    rows, kept = with_stored(config, collect(config))
    laws = analyse(config, rows)
    if write:
        Path(config.run).mkdir(parents=True, exist_ok=True)
        write_results(rows, results_path(config))
        write_json(Path(config.run) / LAWS, laws)
    expected = sum(len(point.budget_steps) for point in points(config))
    of_file = f", {kept} of them from {results_path(config)} (their runs are not there)" if kept else ""
    return f"{len(rows)} of {expected} points measured{of_file}\n{laws_text(laws)}"


def laws_text(laws: Mapping[str, Any]) -> str:
    """The laws of all measures, as text."""
    lines = []
    for measure, of_measure in laws.items():
        lines += ["", f"== {measure}: {_loss_of(measure)}", *_compute(of_measure), *_isoflop(of_measure)]
        lines += [line for name, law in of_measure["joint"].items() for line in _joint(name, law)]
    return "\n".join(lines)


def _loss_of(measure: str) -> str:
    if measure == "cross_entropy":
        return "the loss is the cross-entropy in nats a token"
    return "the loss is 100 - BrierLM" if measure == "brier_lm" else f"the loss is 1 - Brier-{measure[-1]}"


def _compute(laws: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            family,
            *(parameter_text(law["parameters"][name]) for name in ("exponent", "floor")),
            str(law["points"]),
            _error_text(law["held_out"]),
            ", ".join(law["undetermined"]),
        ]
        for family, law in laws["compute"].items()
        if "missing" not in law
    ]
    head = [
        "best models against compute",
        "exponent",
        "floor",
        "points",
        "error at the largest budget, held out",
        "undetermined",
    ]
    missing = [f"{family}: no law, {law['missing']}" for family, law in laws["compute"].items() if "missing" in law]
    return [*(table(head, rows) if rows else []), *missing]


def _isoflop(laws: Mapping[str, Any]) -> list[str]:
    lines = []
    for family, found in laws["isoflop"].items():
        if "missing" in found:
            lines.append(f"isoFLOP {family}: no minimum, {found['missing']}")
            continue
        minima = ", ".join(
            f"{m['flops']:.3g} FLOPs: "
            + (f"N = {m['size']:.3g}{_interval_text(m['interval'])}" if m["size"] else "none inside")
            for m in found["minima"]
        )
        growth = f"; N ~ C^{found['size_exponent']:.2f}" if found["size_exponent"] is not None else ""
        lines.append(f"isoFLOP {family}: {minima}{growth}")
    return lines


def _joint(name: str, law: Mapping[str, Any]) -> list[str]:
    if "missing" in law:
        return [f"joint law of {name}: none, {law['missing']}"]
    parameters = ", ".join(f"{key} {parameter_text(value)}" for key, value in law["parameters"].items())
    lines = [
        f"joint law of {name}, {law['points']} points: {parameters}; "
        f"scatter {law['scatter']:.2g} standard errors; held-out error {_error_text(law['held_out'])}"
    ]
    if law["undetermined"]:
        lines.append(f"  not determined by these points: {', '.join(law['undetermined'])} (at a bound of the fit)")
    for best in law["predictions"]:
        shares = ", ".join(f"{family} {share:.0%}" for family, share in best["families_of_resamplings"].items())
        lines.append(
            f"  best for {best['flops']:.3g} FLOPs: {best['family']} of {best['depth']} layers, N = {best['size']:,}"
            f"{_interval_text(best['size_interval'])}, {best['tokens']:,} tokens, loss {best['loss']:.4g}"
            f"{_interval_text(best['interval'])}; chosen by the resampled laws: {shares}; "
            f"extrapolation error so far: {_error_text(best['held_out'])}"
        )
        if best["edge"]:
            lines.append("  that is the smallest or largest size considered: the law has no minimum for this budget")
    return lines


def parameter_text(found: Mapping[str, Any]) -> str:
    """A parameter with its interval."""
    return f"{_number(found['value'])}{_interval_text(found['interval'])}"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) > 1e-6 else "0"


def _interval_text(interval: Sequence[float] | None) -> str:
    return f" [{_number(interval[0])}, {_number(interval[1])}]" if interval else " [no interval]"


def _error_text(held_out: Mapping[str, float] | None) -> str:
    if held_out is None:
        return "unknown, too few points without it"
    return f"{held_out['error']:.2g} ({held_out['in_standard_errors']:.1f} standard errors)"


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
            _figures(config, known, laws[measure], measure) if known else [Paragraph("No point has it.", True)],
        )
        for measure in config.fit.measures
        for known in [[row for row in rows if row[measure] is not None]]
    ]
    note = f"Intervals are of {config.fit.confidence:.0%}; their coverage is measured in docs/scaling."
    sections += [
        Section("Laws", [Paragraph(note, True), *_law_tables(laws)]),
        Section("Laws in full", [Paragraph(laws_text(laws))], folded=True),
        Section("Plan", [Paragraph(plan_table(config))], folded=True),
        Section("Points", [_point_table(rows)], folded=True),
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


def _point_table(rows: list[Row]) -> Table:
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
            traces.append(_trace(own, "flops", measure, name, color, line=False))
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
            _trace(at, "size", measure, f"{np.mean([row['flops'] for row in at]):.2g} FLOPs", budget)
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
        traces += [_trace(calm, "k", measure, f"CALM, {label}", budget)] if calm else []
        if BASELINE in best:
            traces.append(_trace([best[BASELINE]], "k", measure, f"AR, {label}", budget, line=False))
    title = f"{measure_title(measure)} over K at equal compute"
    return Figure(f"k-{measure}", title, CHUNK, traces, measure_axis(measure))


def _trace(rows: list[Row], x: str, measure: str, name: str, color: int, line: bool = True) -> Trace:
    """Points with their 95 % intervals; hovering names the model."""
    ordered = sorted(rows, key=lambda row: row[x])
    errors = [half_interval(row, measure) for row in ordered]
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
