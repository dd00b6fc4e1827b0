"""A self-contained page: figures with zoom and hover by plotly.js, tables, texts; no network.

The data of all figures is one JSON element of the page, and a short script passes it to the basic bundle of plotly.js,
which lies next to this module and is copied into the page.
"""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calm_core.io import write_text
from calm_core.report.figure import Axis, Figure, Trace
from calm_core.training.run_log import finite

PLOTLY = Path(__file__).with_name("plotly-basic.min.js")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2, summary { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd; }
summary { font-weight: bold; cursor: pointer; } abbr { cursor: help; text-decoration: underline dotted #999; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 8px; }
.cell { min-width: 0; } .figure { height: 320px; }
.about { margin: 0; text-align: right; font-size: 0.85em; color: #666; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92em; } td, th { padding: 2px 12px 2px 0; text-align: left; }
th { border-bottom: 1px solid #aaa; } tr.marked td { background: #fff4d6; }
pre { white-space: pre-wrap; background: #f7f7f7; padding: 0.6em; } .note { color: #666; }
.controls { position: sticky; top: 0; z-index: 2; background: #fff; padding: 0.4em 0; }
.controls label { margin-right: 1.5em; white-space: nowrap; display: inline-block; }
@media (max-width: 600px) { body { margin: 0.5em auto; padding: 0 0.6em; } .figure { height: 280px; } }
"""

SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const byId = (id) => document.getElementById(id);
const smoothed = (values, weight) => {
  let sum = 0, count = 0;
  return values.map((y) => y === null ? null : (sum = weight * sum + y, count = weight * count + 1, sum / count));
};
const shown = (figure) => {
  const unit = byId("unit") ? byId("unit").value : "step", weight = byId("smooth") ? Number(byId("smooth").value) : 0;
  const known = unit === "step" || figure.data.every((trace, i) => figure.other_x[i][unit]);
  const data = figure.data.map((trace, i) => ({
    ...trace,
    x: known && unit !== "step" ? figure.other_x[i][unit] : trace.x,
    y: weight && figure.smooth[i] ? smoothed(trace.y, weight) : trace.y,
  }));
  const xaxis = known && unit !== "step" ? {title: {text: unit, standoff: 8}, automargin: true} : figure.layout.xaxis;
  return [data, {...figure.layout, xaxis}];
};
const options = {responsive: true, displaylogo: false, displayModeBar: innerWidth > 600 ? "hover" : false};
const drawAll = () => {
  for (const [id, figure] of Object.entries(figures)) Plotly.react(id, ...shown(figure), options);
};
for (const control of document.querySelectorAll(".controls *")) control.addEventListener("change", drawAll);
drawAll();
"""

CONTROLS = """<div class="controls"><label>x axis <select id="unit"><option>step</option>{units}</select></label>
<label>smoothing <input id="smooth" type="range" min="0" max="0.98" step="0.02" value="0"></label></div>"""


@dataclass(frozen=True)
class Table:
    """A table; rows whose index is in `marked` are highlighted.

    `about` explains cells of the head or of the first column by their text.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    marked: frozenset[int] = frozenset()
    about: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Paragraph:
    """A text shown as it is; a note is small print, and links lead to files near the page."""

    text: str
    note: bool = False
    links: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A heading and its contents: figures side by side, everything else one below another; initially folded or not."""

    title: str
    parts: Sequence[Figure | Table | Paragraph]
    folded: bool = False


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write the page, whole or not at all."""
    write_text(path, render(title, sections))


def render(title: str, sections: Sequence[Section]) -> str:
    """The page as HTML text."""
    filled = [section for section in sections if section.parts]
    figures = [part for section in filled for part in section.parts if isinstance(part, Figure)]
    data = {figure.name: _plotly(figure) for figure in figures}
    # "</" would end the element that the data is in.
    embedded = json.dumps(finite(data), allow_nan=False).replace("</", "<\\/")
    units = dict.fromkeys(unit for figure in figures for trace in figure.traces for unit in trace.other_x)
    controls = CONTROLS.format(units="".join(f"<option>{html.escape(unit)}</option>" for unit in units))
    return "\n".join(
        [
            f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>',
            controls if units else "",
            *(_section(section) for section in filled),
            f'<script type="application/json" id="figures">{embedded}</script>',
            f"<script>{PLOTLY.read_text(encoding='utf-8')}</script><script>{SCRIPT}</script></body></html>",
        ]
    )


def number(value: Any) -> str:
    """A value of a table: a float with four digits, or in whole numbers from a thousand on."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _section(section: Section) -> str:
    title = html.escape(section.title)
    lines, row = [f"<details><summary>{title}</summary>" if section.folded else f"<h2>{title}</h2>"], []
    for part in [*section.parts, None]:
        if isinstance(part, Figure):
            about = f'<p class="about"><abbr title="{html.escape(part.about)}">what is this?</abbr></p>'
            cell = f'<div class="figure" id="{html.escape(part.name)}"></div>{about if part.about else ""}'
            row.append(f'<div class="cell">{cell}</div>')
            continue
        if row:
            lines.append(f'<div class="figures">{"".join(row)}</div>')
            row = []
        if part is not None:
            lines.append(_table(part) if isinstance(part, Table) else _paragraph(part))
    if section.folded:
        lines.append("</details>")
    return "\n".join(lines)


def _table(table: Table) -> str:
    def shown(cell: Any) -> str:
        text, about = html.escape(str(cell)), table.about.get(str(cell))
        return f'<abbr title="{html.escape(about)}">{text}</abbr>' if about else text

    head = "".join(f"<th>{shown(cell)}</th>" for cell in table.head)
    rows = [
        f"<tr{' class=marked' if index in table.marked else ''}>"
        + "".join(
            f"<td>{shown(cell) if not column else html.escape(str(cell))}</td>" for column, cell in enumerate(row)
        )
        + "</tr>"
        for index, row in enumerate(table.rows)
    ]
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _paragraph(text: Paragraph) -> str:
    links = " ".join(f'<a href="{html.escape(to)}">{html.escape(name)}</a>' for name, to in text.links.items())
    if text.note or text.links:
        return f'<p class="note">{html.escape(text.text)} {links}</p>'
    return f"<pre>{html.escape(text.text)}</pre>"


def _plotly(figure: Figure) -> dict[str, Any]:
    """The data and layout of plotly.js; beside each line its other x values, and whether smoothing applies to it."""
    data, other_x, smooth = [], [], []
    for trace, color in zip(figure.traces, figure.colors(), strict=True):
        drawn = [_line(trace, color)]
        if trace.error is not None and not _has_bars(trace):
            drawn.insert(0, _band(trace, color))
        for line in drawn:
            outline = line.get("fill") == "toself"
            data.append(line)
            other_x.append({unit: _outline_x(trace, x) if outline else list(x) for unit, x in trace.other_x.items()})
            smooth.append(trace.line and not trace.points)
    layout = {
        "title": {"text": figure.title, "font": {"size": 14}, "x": 0.01, "xanchor": "left"},
        "xaxis": _axis(figure.x, [trace.x for trace in figure.traces]),
        "yaxis": _axis(figure.y, [trace.y for trace in figure.traces]),
        "margin": {"l": 64, "r": 12, "t": 36, "b": 80 if len(figure.traces) > 1 else 48},
        "showlegend": len(figure.traces) > 1,
        "legend": {"orientation": "h", "y": -0.38 if len(figure.traces) <= 6 else -0.6},
    }
    return {"data": data, "layout": layout, "other_x": other_x, "smooth": smooth}


def _axis(axis: Axis, columns: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    layout: dict[str, Any] = {
        "title": {"text": axis.label, "standoff": 8},
        "type": "log" if axis.log else "linear",
        "automargin": True,
    }
    if axis.log == 2:
        layout["dtick"] = math.log10(2)
    if axis.percent:
        layout["tickformat"] = layout["hoverformat"] = ".4~%"
    values = {value for column in columns for value in column if value is not None}
    ends = {end for end in (axis.least, axis.most) if end is not None}
    if len(values | ends) == 1 and (value := next(iter(values | ends))) and not axis.log:
        twice = 1.05 if axis.percent and 0.5 < value <= 1 else 2.0 * value  # no shares above 100 %
        layout["range"] = sorted((0.0, twice))  # plotly.js would give a single value a range of its own size
    elif ends and len(values) <= 1:
        layout["range"] = [min(values | ends), max(values | ends)]
    return layout


def _line(trace: Trace, color: str) -> dict[str, Any]:
    line: dict[str, Any] = {
        "name": trace.name,
        "x": list(trace.x),
        "y": list(trace.y),
        "mode": _mode(trace),
        "line": {"color": color, "dash": "dash" if trace.dashed else "solid"},
    }
    if trace.error is not None and _has_bars(trace):
        line |= {"error_y": {"type": "data", "array": list(trace.error)}, "marker": {"color": color}}
    return line if trace.text is None else line | {"text": list(trace.text)}


def _has_bars(trace: Trace) -> bool:
    """Whether errors are bars: a band around a single point has no width."""
    return not trace.line or len(trace.x) == 1


def _mode(trace: Trace) -> str:
    if not trace.line:
        return "markers"
    return "lines+markers" if trace.points or len(trace.x) == 1 else "lines"


def _band(trace: Trace, color: str) -> dict[str, Any]:
    """The area between y - error and y + error, as one closed outline."""
    known = [(trace.y[i], trace.error[i]) for i in _with_error(trace)]
    return {
        "x": _outline_x(trace, trace.x),
        "y": [y + e for y, e in known] + [y - e for y, e in reversed(known)],
        "mode": "lines",
        "fill": "toself",
        "fillcolor": color,
        "opacity": 0.2,
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _outline_x(trace: Trace, x: Sequence[float]) -> list[float]:
    known = [x[i] for i in _with_error(trace)]
    return [*known, *reversed(known)]


def _with_error(trace: Trace) -> list[int]:
    """The points of a trace that have a value and an error."""
    return [i for i, error in enumerate(trace.error or ()) if trace.y[i] is not None and error is not None]
