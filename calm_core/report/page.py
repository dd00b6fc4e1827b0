"""A page that needs nothing but itself: figures with zoom and hover by plotly.js, tables, texts; no network.

The data of all figures is one JSON element of the page, and a few lines of script hand it to plotly.js, which is copied
into the page from the plotly package.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from calm_core.io import write_text
from calm_core.training.run_log import finite

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 8px; }
.figure { height: 320px; }
table { border-collapse: collapse; font-size: 0.92em; } td, th { padding: 2px 12px 2px 0; text-align: left; }
th { border-bottom: 1px solid #aaa; } tr.marked td { background: #fff4d6; }
pre { white-space: pre-wrap; background: #f7f7f7; padding: 0.6em; } .note { color: #666; }
"""

SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
for (const [id, figure] of Object.entries(figures))
  Plotly.newPlot(id, figure.data, figure.layout, {responsive: true, displaylogo: false, displayModeBar: "hover"});
"""


@dataclass(frozen=True)
class Trace:
    """One line of a figure.

    Attributes:
        name: in the legend.
        x: values.
        y: values; None leaves a gap, and so does what is not finite.
        error: half the height of a band around the line; None where it is unknown.
        group: traces of a group have one colour.
        points: draw markers.
        line: join them; where not, errors are bars.
        text: what hovering says of each point beside its values.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    error: Sequence[float | None] | None = None
    group: str = ""
    points: bool = False
    line: bool = True
    text: Sequence[str] | None = None


@dataclass(frozen=True)
class Figure:
    """A figure with axes.

    Attributes:
        name: unique on the page, and the id of its element.
        title: above it.
        x: label of the x axis.
        traces: its lines.
        y: label of the y axis.
        log_x: whether x is logarithmic.
    """

    name: str
    title: str
    x: str
    traces: Sequence[Trace]
    y: str = ""
    log_x: bool = False


@dataclass(frozen=True)
class Table:
    """A table; rows whose index is in `marked` stand out."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Text:
    """Text as it is; a note is small print, and links lead to files beside the page."""

    text: str
    note: bool = False
    links: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A heading and what is below it; figures beside each other, the rest below one another."""

    title: str
    parts: Sequence[Figure | Table | Text]


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write the page, whole or not at all."""
    write_text(path, render(title, sections))


def render(title: str, sections: Sequence[Section]) -> str:
    """The page as HTML text."""
    shown = [section for section in sections if section.parts]
    figures = [part for section in shown for part in section.parts if isinstance(part, Figure)]
    data = {figure.name: _plotly(figure) for figure in figures}
    # "</" would end the element that the data is in.
    embedded = json.dumps(finite(data), allow_nan=False).replace("</", "<\\/")
    library = (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    return "\n".join(
        [
            f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
            f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>',
            *(_section(section) for section in shown),
            f'<script type="application/json" id="figures">{embedded}</script>',
            f"<script>{library}</script><script>{SCRIPT}</script></body></html>",
        ]
    )


def _section(section: Section) -> str:
    lines, row = [f"<h2>{html.escape(section.title)}</h2>"], []
    for part in [*section.parts, None]:
        if isinstance(part, Figure):
            row.append(f'<div class="figure" id="{html.escape(part.name)}"></div>')
            continue
        if row:
            lines.append(f'<div class="figures">{"".join(row)}</div>')
            row = []
        if part is not None:
            lines.append(_table(part) if isinstance(part, Table) else _text(part))
    return "\n".join(lines)


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    rows = [
        f"<tr{' class=marked' if index in table.marked else ''}>"
        + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
        + "</tr>"
        for index, row in enumerate(table.rows)
    ]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _text(text: Text) -> str:
    links = " ".join(f'<a href="{html.escape(to)}">{html.escape(name)}</a>' for name, to in text.links.items())
    if text.note or text.links:
        return f'<p class="note">{html.escape(text.text)} {links}</p>'
    return f"<pre>{html.escape(text.text)}</pre>"


def _plotly(figure: Figure) -> dict[str, Any]:
    colours = list(dict.fromkeys(trace.group or trace.name for trace in figure.traces))
    data = []
    for trace in figure.traces:
        colour = _PALETTE[colours.index(trace.group or trace.name) % len(_PALETTE)]
        if trace.error is not None and trace.line:
            data.append(_band(trace, colour))
        line: dict[str, Any] = {
            "name": trace.name,
            "x": list(trace.x),
            "y": list(trace.y),
            "mode": _mode(trace),
            "line": {"color": colour},
        }
        if trace.error is not None and not trace.line:
            line |= {"error_y": {"type": "data", "array": list(trace.error)}, "marker": {"color": colour}}
        data.append(line if trace.text is None else line | {"text": list(trace.text)})
    layout = {
        "title": {"text": figure.title, "font": {"size": 14}, "x": 0.01, "xanchor": "left"},
        "xaxis": {"title": {"text": figure.x}, "type": "log" if figure.log_x else "linear"},
        "yaxis": {"title": {"text": figure.y}},
        "margin": {"l": 60, "r": 12, "t": 36, "b": 80},
        "showlegend": len(figure.traces) > 1,
        "legend": {"orientation": "h", "y": -0.32},
    }
    values = {y for trace in figure.traces for y in trace.y if y is not None}
    if len(values) == 1 and (value := values.pop()):  # plotly.js gives a constant a range of its own size: from 0 then
        layout["yaxis"] |= {"range": sorted((0.0, 2.0 * value))}
    return {"data": data, "layout": layout}


def _mode(trace: Trace) -> str:
    if not trace.line:
        return "markers"
    return "lines+markers" if trace.points or len(trace.x) == 1 else "lines"


def _band(trace: Trace, colour: str) -> dict[str, Any]:
    """The area between y - error and y + error, as one closed outline."""
    known = [
        (x, y, error)
        for x, y, error in zip(trace.x, trace.y, trace.error or (), strict=True)
        if y is not None and error is not None
    ]
    return {
        "x": [x for x, _, _ in known] + [x for x, _, _ in reversed(known)],
        "y": [y + e for _, y, e in known] + [y - e for _, y, e in reversed(known)],
        "mode": "lines",
        "fill": "toself",
        "fillcolor": colour,
        "opacity": 0.2,
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
    }


_PALETTE = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
