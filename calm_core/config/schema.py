"""What a configuration is: frozen dataclasses whose fields carry their meaning, their bounds and what they decide.

A configuration is a tree of dataclasses: the root's dataclass fields are its sections. Each field is made by `option`,
and each class calls `check` in its `__post_init__`. `load_config` fills the tree and writes it; there it
is flat, leaves with dotted keys such as `training.steps`.
"""

import copy
import dataclasses
import math
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import yaml

from calm_core.errors import UserError

PathText = Annotated[str, "path"]
"""A path as text: `~` and `$NAME` are expanded when it is read, and it is absolute where a run is saved."""

Owner = Literal["weights", "training", "data", "chunks", "scores", "nothing"]
"""What a field decides, and so what can still be used after it changes.

weights:  shapes and function of the network: weights trained with another value do not fit.
training: what training makes of the weights: loss, optimizer, schedule, batch.
data:     the text and the tokens that are trained and scored on.
chunks:   how the tokens are made into chunks: irrelevant to a model that reads tokens.
scores:   which scores an evaluation reports.
nothing:  none of these: where files are, how the work is divided, what is kept and shown.
"""


@dataclass(frozen=True)
class Bounds:
    """The range of a number, each end None where there is none."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def complaint(self, value: float) -> str | None:
        """What is wrong with a value, as the end of a sentence; None if nothing is."""
        if self.at_least is not None and not value >= self.at_least:
            return f"must be at least {self.at_least:g}"
        if self.above is not None and not value > self.above:
            return f"must be above {self.above:g}"
        if self.at_most is not None and not value <= self.at_most:
            return f"must be at most {self.at_most:g}"
        if self.below is not None and not value < self.below:
            return f"must be below {self.below:g}"
        return None


@dataclass(frozen=True)
class Leaf:
    """One field of the flattened configuration."""

    annotation: Any
    default: Any
    meaning: str
    bounds: Bounds
    belongs_to: Owner | None


def option(default: Any, meaning: str, *, belongs_to: Owner | None = None, **bounds: float) -> Any:
    """A dataclass field with a default and the meaning that `--help` prints.

    Args:
        default: a list, dict or dataclass is copied for each instance; a class (`option(DataConfig, "...")`) is called.
        meaning: one line.
        belongs_to: what the field decides (see `Owner`); None, where nothing asks, counts as everything.
        bounds: those of `Bounds`, for a number.
    """
    metadata = {"meaning": meaning, "bounds": Bounds(**bounds), "belongs_to": belongs_to}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check(section: Any, name: str) -> None:
    """Refuse values of a section that are outside the bounds or the choices of their fields.

    Args:
        section: an instance, from its `__post_init__`.
        name: its key, for the sentence; empty for the root.

    Raises:
        UserError: naming the first such field.
    """
    hints = typing.get_type_hints(type(section), include_extras=True)
    for field in dataclasses.fields(section):
        key, value = f"{name}.{field.name}" if name else field.name, getattr(section, field.name)
        if typing.get_origin(hints[field.name]) is Literal and value not in typing.get_args(hints[field.name]):
            *others, last = map(str, typing.get_args(hints[field.name]))
            raise UserError(f"{key}={value!r} is unknown: choose {', '.join(others)} or {last}.")
        if bounds := field.metadata.get("bounds"):
            require_in_bounds(key, value, bounds)


def require_in_bounds(key: str, value: Any, bounds: Bounds) -> None:
    """Refuse a number, or one in a list of numbers, that is outside its bounds or not finite.

    Raises:
        UserError: naming the key.
    """
    for number in value if isinstance(value, list) else [value]:
        if not isinstance(number, int | float):
            continue
        subject = f"{key} holds {number}, which" if isinstance(value, list) else f"{key}={number}"
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{subject} must be a finite number.")
        if complaint := bounds.complaint(number):
            raise UserError(f"{subject} {complaint}.")


def flatten_schema(cls: type, base: Any = None, prefix: str = "") -> dict[str, Leaf]:
    """The leaves of `cls` by dotted key; defaults come from the instance `base` where one is given."""
    leaves: dict[str, Leaf] = {}
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        default = _default(field) if base is None else getattr(base, field.name)
        if is_section(hints[field.name]):
            known = None if default is dataclasses.MISSING else default
            leaves |= flatten_schema(hints[field.name], known, f"{prefix}{field.name}.")
        else:
            about = field.metadata
            leaves[prefix + field.name] = Leaf(
                hints[field.name],
                default,
                about.get("meaning", ""),
                about.get("bounds", Bounds()),
                about.get("belongs_to"),
            )
    return leaves


def decides(cls: type, key: str, *owners: Owner) -> bool:
    """Whether the field `key` of `cls` belongs to one of these; one that does not say, or is unknown, may."""
    leaf = flatten_schema(cls).get(key)
    return leaf is None or leaf.belongs_to is None or leaf.belongs_to in owners


def describe(cls: type, sections: Sequence[str] | None = None, width: int = 0) -> str:
    """The fields of the root and of `sections` (by default of all): key, type, default and meaning, in aligned columns.

    With a `width`, lines are wrapped to it; where the meanings would have too narrow a column, they go below the keys.
    """
    rows = [
        (key, type_name(leaf.annotation), inline(leaf.default), leaf.meaning)
        for key, leaf in flatten_schema(cls).items()
        if is_read(key, sections)
    ]
    # A long default pushes its own meaning to the right, not everyone's.
    widths = [max((min(len(row[column]), 32) for row in rows), default=0) for column in range(3)]
    indent = sum(widths) + 2 * len(widths)
    if width and width < indent + 40:
        below = {"width": width, "initial_indent": " " * 4, "subsequent_indent": " " * 4}
        hanging = {"width": width, "subsequent_indent": " " * 4}
        blocks = [[*textwrap.wrap("  ".join(row[:3]), **hanging), *textwrap.wrap(row[3], **below)] for row in rows]
        return "\n".join(line for block in blocks for line in block)
    lines = [
        "  ".join([*(cell.ljust(size) for cell, size in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    ]
    if width:
        lines = [part for line in lines for part in _wrapped(line, width, indent)]
    return "\n".join(lines)


def _wrapped(line: str, width: int, indent: int) -> Iterator[str]:
    """A line cut at spaces to `width` columns; the rest continues at column `indent`."""
    while len(line) > width:
        cut = line.rfind(" ", indent, width + 1)
        if cut <= indent:
            break
        yield line[:cut].rstrip()
        line = " " * indent + line[cut:].lstrip()
    yield line


def type_name(annotation: Any) -> str:
    """A type as `--help` and the sentences name it: `float`, `list[path]`, `str | null`, `auto | full`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if annotation == PathText:
        return "path"
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(type_name, arguments))
    if is_section(annotation):
        return f"{{{', '.join(field.name for field in dataclasses.fields(annotation))}}}"
    if origin:
        return f"{origin.__name__}[{', '.join(map(type_name, arguments))}]"
    return annotation.__name__


def is_section(annotation: Any) -> bool:
    """Whether a type is a dataclass of further fields."""
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def is_read(key: str, sections: Sequence[str] | None) -> bool:
    """Whether a command of these sections reads `key`; the root's own fields concern every command."""
    return sections is None or "." not in key or key.partition(".")[0] in sections


def inline(value: Any) -> str:
    """A value as one line of YAML."""
    return " ".join(yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").split())


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
