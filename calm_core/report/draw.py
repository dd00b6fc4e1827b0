"""Figures as PNG and SVG files, by matplotlib."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import NullFormatter, PercentFormatter

from calm_core.io import replacing
from calm_core.report.figure import Axis, Figure, Trace


def draw(figures: Sequence[Figure], *paths: Path, width: float = 6.0, height: float = 4.0) -> None:
    """Draw figures beside each other into files, whose suffixes say their formats."""
    canvas = Canvas(figsize=(width * len(figures), height), layout="constrained")
    for figure, axes in zip(figures, canvas.subplots(1, len(figures), squeeze=False)[0], strict=True):
        _draw(figure, axes)
    for path in paths:
        with replacing(path) as temporary:
            canvas.savefig(temporary, format=path.suffix[1:], dpi=120)


def _draw(figure: Figure, axes: Axes) -> None:
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


def _draw_trace(trace: Trace, axes: Axes, color: str) -> None:
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
    if axis.log:
        set_scale("log", base=axis.log)
        ticks.set_minor_formatter(NullFormatter())
    if axis.percent:
        ticks.set_major_formatter(PercentFormatter(xmax=1))
    if axis.least is not None or axis.most is not None:
        set_limits(axis.least, axis.most)
