"""Figures: what they show, drawing them into files by matplotlib, and those of a run.

`page.py` puts the same figures on a page.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calm_core.evaluation.brier import half_interval
from calm_core.io import replacing

if TYPE_CHECKING:  # matplotlib takes most of a second, which a page does not need
    from matplotlib.axes import Axes

PALETTE = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")

GREY = 7  # of the palette: baselines and published results

Record = Mapping[str, Any]

Records = Sequence[Record]


@dataclass(frozen=True)
class Axis:
    """An axis: what it counts and in which unit, and its scale.

    Attributes:
        label: in words, with the unit.
        log: base of a logarithmic scale; 0 for a linear one.
        percent: values are fractions, shown as per cent.
        least: the range contains this value.
        most: the range contains this value.
    """

    label: str
    log: int = 0
    percent: bool = False
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Trace:
    """One line of a figure.

    Attributes:
        name: in the legend.
        x: values.
        y: values; None leaves a gap, and so does what is not finite.
        error: half the height of a band around the line, or of the bars of points; None where it is unknown.
        group: traces of a group have one colour.
        points: draw markers.
        line: join them.
        dashed: whether the line is dashed.
        color: of the palette; by the order of the groups where it is None.
        text: what hovering shows for each point in addition to its values.
        other_x: the same points by other units, from the name of the unit.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    error: Sequence[float | None] | None = None
    group: str = ""
    points: bool = False
    line: bool = True
    dashed: bool = False
    color: int | None = None
    text: Sequence[str] | None = None
    other_x: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """A figure with axes.

    Attributes:
        name: unique on the page, and the id of its element.
        title: above it.
        x: the horizontal axis.
        traces: its lines.
        y: the vertical axis.
        about: one sentence that explains what is shown.
    """

    name: str
    title: str
    x: Axis
    traces: Sequence[Trace]
    y: Axis = Axis("")
    about: str = ""

    def colors(self) -> list[str]:
        """The colour of each trace."""
        groups = list(dict.fromkeys(trace.group or trace.name for trace in self.traces if trace.color is None))
        numbers = [
            groups.index(trace.group or trace.name) if trace.color is None else trace.color for trace in self.traces
        ]
        return [PALETTE[number % len(PALETTE)] for number in numbers]


def curve(records: Iterable[Record], key: str, name: str, **look: Any) -> Trace | None:
    """A number of the records over steps; None if none has it."""
    known = [record for record in records if key in record]
    return Trace(name, [r["step"] for r in known], [r[key] for r in known], **look) if known else None


def curve_with_band(records: Iterable[Record], key: str, name: str, **look: Any) -> Trace | None:
    """A number of the records over steps, with a band of its 95 % interval; None if none has it."""
    known = [record for record in records if record.get(key) is not None]
    if not known:
        return None
    band = [half_interval(record, key) for record in known]
    return Trace(
        name, [r["step"] for r in known], [r[key] for r in known], band if any(band) else None, points=True, **look
    )


def draw(figures: Sequence[Figure], *paths: Path, width: float = 6.0, height: float = 4.0) -> None:
    """Draw figures side by side into files, whose suffixes say their formats."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width * len(figures), height), layout="constrained")
    for figure, axes in zip(figures, canvas.subplots(1, len(figures), squeeze=False)[0], strict=True):
        _draw(figure, axes)
    for path in paths:
        with replacing(path) as temporary:
            canvas.savefig(temporary, format=path.suffix[1:], dpi=120)


def _draw(figure: Figure, axes: "Axes") -> None:
    axes.set_title(figure.title)
    axes.set_xlabel(figure.x.label)
    axes.set_ylabel(figure.y.label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    for trace, color in zip(figure.traces, figure.colors(), strict=True):
        _draw_trace(trace, axes, color)
    _scale(figure.x, axes.xaxis, axes.set_xscale, axes.set_xlim)
    _scale(figure.y, axes.yaxis, axes.set_yscale, axes.set_ylim)
    if len(figure.traces) > 1:
        axes.legend(frameon=False)


def _draw_trace(trace: Trace, axes: "Axes", color: str) -> None:
    known = [i for i, y in enumerate(trace.y) if y is not None and math.isfinite(y)]
    x, y = [trace.x[i] for i in known], [trace.y[i] for i in known]
    errors = [(trace.error[i] if trace.error else None) or 0.0 for i in known]
    style = ("--" if trace.dashed else "-") if trace.line else "none"
    marker = "o" if trace.points or not trace.line or len(x) == 1 else None
    axes.plot(x, y, color=color, linestyle=style, marker=marker, markersize=4, label=trace.name)
    if trace.error is None:
        return
    if trace.line and len(x) > 1:
        low, high = ([v + sign * e for v, e in zip(y, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    else:
        axes.errorbar(x, y, errors, fmt="none", ecolor=color, capsize=2)


def _scale(axis: Axis, ticks: Any, set_scale: Callable[..., Any], set_limits: Callable[..., Any]) -> None:
    from matplotlib.ticker import NullFormatter, PercentFormatter, StrMethodFormatter

    if axis.log:
        set_scale("log", base=axis.log)
        ticks.set_minor_formatter(NullFormatter())
    if axis.log == 2:
        ticks.set_major_formatter(StrMethodFormatter("{x:g}"))  # 1, 2, 4 and not powers of two
    if axis.percent:
        ticks.set_major_formatter(PercentFormatter(xmax=1))
    if axis.least is not None or axis.most is not None:
        set_limits(axis.least, axis.most)


STEPS = Axis("step")


def plot_loss(train: Records, evaluations: Records, title: str, path: Path) -> None:
    """The training loss over steps and, where evaluations know it, the held-out loss with its 95 % interval."""
    traces = [
        curve(train, "loss", "training", color=0),
        curve_with_band(evaluations, "loss", "held-out documents", color=1),
    ]
    draw([Figure("loss", title, STEPS, [t for t in traces if t], Axis("loss"))], path)


def plot_brier(evaluations: Records, path: Path) -> None:
    """Brier-1 and, for chunks of several tokens, Brier-2 on held-out documents over steps, and the baselines.

    The band is the 95 % interval.
    """
    shown = [n for n in (1, 2) if f"brier_{n}" in evaluations[-1]]
    figures = []
    for n in shown:
        traces = [
            curve_with_band(evaluations, f"brier_{n}", "model", color=0),
            curve(evaluations, f"unigram_brier_{n}", "unigram", color=GREY, dashed=True),
            curve(evaluations, f"bigram_brier_{n}", "bigram", color=3, dashed=True),
        ]
        title = f"Brier-{n} on held-out documents"
        figures.append(Figure(f"brier-{n}", title, STEPS, [t for t in traces if t], brier_axis(n)))
    draw(figures, path, width=5)


def brier_axis(n: int) -> Axis:
    """The axis of Brier-n."""
    return Axis(f"Brier-{n}, per cent", percent=True)


def plot_noise_curve(evaluation: Mapping[str, Any], path: Path) -> None:
    """The fraction of tokens that an autoencoder reconstructs under noise, over its standard deviation."""
    sigmas, accuracies = zip(*evaluation["noise_curve"], strict=True)
    mean = evaluation["mean_sigma"]
    traces = [
        Trace("reconstructed", sigmas, accuracies, points=True),
        Trace("mean sigma of the posterior", [mean, mean], [0.0, 1.0], color=GREY, dashed=True),
    ]
    title, x = "Tokens reconstructed under noise, held-out documents", Axis("standard deviation of the noise")
    draw([Figure("noise", title, x, traces, Axis("tokens reconstructed", percent=True, least=0, most=1.02))], path)


def plot_correlation(points: Records, r: float | None, path: Path) -> None:
    """BrierLM over cross-entropy, plain and on a logarithmic scale, where it is significant; a colour for each width.

    The bars are 95 % intervals.
    """
    traces = []
    for width in dict.fromkeys(point["width"] for point in points):
        own = [point for point in points if point["width"] == width and point["brier_lm"] is not None]
        x, y = ([point[name] for point in own] for name in ("cross_entropy", "brier_lm"))
        traces.append(Trace(f"width {width}", x, y, [half_interval(point, "brier_lm") for point in own], line=False))
    title = "BrierLM" if r is None else f"BrierLM: r = {r:.3f}"
    entropy = Axis("held-out cross-entropy, nats per token")
    figures = [
        Figure("linear", title, entropy, traces, Axis("BrierLM")),
        Figure("log", "logarithmic scale", entropy, traces, Axis("BrierLM", log=10)),
    ]
    draw(figures, path, width=5)
