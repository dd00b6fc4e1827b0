"""What a figure shows. `draw.py` makes PNG and SVG files of it, `page.py` puts it on a page."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PALETTE = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")

GREY = 7  # of the palette: baselines and published results

Record = Mapping[str, Any]


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
        text: what hovering says of each point beside its values.
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


def half_interval(record: Record, key: str) -> float | None:
    """Half the width of the 95 % interval of a score; None where its standard error is not known.

    An evaluation says how many standard errors that is, more with few documents; one that does not say it gets two.
    """
    error = record.get(f"{key}_error")
    factor = (record.get("standard_errors") or {}).get("interval_factor") or 2.0
    return None if error is None else factor * error
