"""Configuration: frozen dataclasses, filled from defaults, then a YAML file, then `a.b=c` overrides.

A configuration is a tree of dataclasses: the root's dataclass fields are its sections. Each part of the library owns
its dataclass, makes the fields by `option`, and checks them together in `__post_init__`. Here the tree is seen flat,
as leaves with dotted keys such as `training.lr`; whatever a user can get wrong ends in a `UserError` of one sentence.
"""

import contextlib
import copy
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from calm_core.errors import UserError
from calm_core.io import write_text

T = TypeVar("T")

# YAML 1.1 reads `3e-4` as text: a float needs its dot there.
FLOAT_TEXT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

COMMAND_LINE = "the command line"


@dataclass(frozen=True)
class Leaf:
    """One field of the flattened configuration."""

    annotation: Any
    default: Any
    meaning: str


def option(default: Any, meaning: str) -> Any:
    """A dataclass field with a default and the meaning that `--help` prints.

    A list, dict or dataclass default is copied for each instance; a class (`option(DataConfig, "...")`) is called.
    """
    metadata = {"meaning": meaning}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def load(cls: type[T], path: Path | None, overrides: Sequence[str], sections: Sequence[str] | None = None) -> T:
    """The configuration `cls` from its defaults, the YAML file at `path`, then the `a.b=c` overrides, typed strictly.

    With `sections`, an override may only touch those sections and the root's own fields; the file may hold any section
    of `cls`, so that one file serves every command. Raises `UserError` for what cannot be read, an unknown key or a
    value of the wrong type; the dataclasses raise it for values that do not fit together.
    """
    leaves = flatten_schema(cls)
    values = {key: leaf.default for key, leaf in leaves.items()}
    if path is not None:
        values.update(_checked(read_yaml(path), leaves, str(path)))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"The override {override!r} has no value: write it as key=value.")
        values[key] = _override(key, text, leaves, sections)
    return _build(cls, values)


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested plain dicts, in the order of the fields."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The configuration as YAML text, one field a line, that `load` reads back equal."""
    return dump(to_dict(config))


def dump(content: Mapping[str, Any]) -> str:
    """Nested plain dicts as YAML text, one field a line."""
    return yaml.safe_dump(dict(content), sort_keys=False, width=math.inf)


def save(config: Any, path: Path) -> None:
    """Write the resolved configuration as YAML, atomically."""
    write_text(path, to_yaml(config))


def describe(cls: type, sections: Sequence[str] | None = None) -> str:
    """One aligned line for each field of the root and of `sections` (all without): key, type, default, meaning."""
    rows = [
        (key, type_name(leaf.annotation), _inline(leaf.default), leaf.meaning)
        for key, leaf in flatten_schema(cls).items()
        if _is_read(key, sections)
    ]
    # A long default pushes its own meaning to the right, not everyone's.
    widths = [max((min(len(row[column]), 32) for row in rows), default=0) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """All (dotted key, old value, new value) that differ between two nested dicts; None where a key is absent."""
    before, after = dict(flatten(old)), dict(flatten(new))
    return [(key, before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key)]


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The (dotted key, value) pairs of a nested mapping."""
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def flatten_schema(cls: type, base: Any = None, prefix: str = "") -> dict[str, Leaf]:
    """The leaves of `cls` by dotted key; defaults come from the instance `base` where one is given."""
    leaves: dict[str, Leaf] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        default = _default(field) if base is None else getattr(base, field.name)
        if _is_section(hints[field.name]):
            leaves |= flatten_schema(hints[field.name], default, f"{prefix}{field.name}.")
        else:
            leaves[prefix + field.name] = Leaf(hints[field.name], default, field.metadata.get("meaning", ""))
    return leaves


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, {} for an empty one; `UserError` when missing, invalid or with a key given twice."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except OSError as error:
        raise UserError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{path} is not valid YAML: {where}{error.problem}.") from error
    except (yaml.YAMLError, ValueError) as error:  # unreadable characters, an impossible date
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path} holds {_inline(content)}, but a configuration needs `key: value` lines.")
    return content or {}


def type_name(annotation: Any) -> str:
    """A type as `--help` and the sentences name it: `float`, `list[str]`, `str | None`, `auto | full`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(type_name, arguments))
    if _is_section(annotation):
        return f"{{{', '.join(field.name for field in dataclasses.fields(annotation))}}}"
    if origin:
        return f"{origin.__name__}[{', '.join(map(type_name, arguments))}]"
    return annotation.__name__


def convert(value: Any, annotation: Any) -> Any:
    """`value`, as YAML gives it, as the type `annotation`; `TypeError` where it is none.

    An int, and text such as `3e-4`, is a float; a bool is no number; a dataclass in a list is a mapping of its fields.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _convert_to_first(value, arguments)
    if origin is Literal and any(value == choice and type(value) is type(choice) for choice in arguments):
        return value
    if origin is list and isinstance(value, list):
        return [convert(item, arguments[0]) for item in value]
    if origin is dict and isinstance(value, dict):
        return {convert(key, arguments[0]): convert(item, arguments[1]) for key, item in value.items()}
    if _is_section(annotation) and isinstance(value, dict):
        hints = typing.get_type_hints(annotation)
        if not value.keys() <= hints.keys():
            raise TypeError
        return annotation(**{name: convert(item, hints[name]) for name, item in value.items()})
    if type(value) is annotation and value == value:  # not-a-number is no value
        return value
    if annotation is float and (type(value) is int or (isinstance(value, str) and FLOAT_TEXT.fullmatch(value))):
        return float(value)
    raise TypeError


def _convert_to_first(value: Any, annotations: Sequence[Any]) -> Any:
    for annotation in annotations:
        try:
            return convert(value, annotation)
        except TypeError:
            continue
    raise TypeError


def _checked(
    mapping: Mapping[Any, Any], leaves: Mapping[str, Leaf], source: str, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """The (dotted key, converted value) pairs of a nested mapping."""
    for name, value in mapping.items():
        key = f"{prefix}{name}"
        if key in leaves:
            yield key, _converted(key, value, leaves[key].annotation, source)
        elif not _has_section(leaves, key):
            raise _unknown(key, leaves, source)
        elif isinstance(value, dict):
            yield from _checked(value, leaves, source, f"{key}.")
        elif value is not None:  # a section whose lines are all commented out is null
            raise UserError(
                f"{key} in {source} is a section, not the value {_inline(value)}: give its fields below it."
            )


def _override(key: str, text: str, leaves: Mapping[str, Leaf], sections: Sequence[str] | None) -> Any:
    """The converted value of one `key=text`."""
    if _has_section(leaves, key):
        raise UserError(f"{key} on {COMMAND_LINE} is a section: set its fields one by one, as {key}.field=value.")
    if key not in leaves:
        raise _unknown(key, leaves, COMMAND_LINE)
    if not _is_read(key, sections):
        readable = ", ".join(dict.fromkeys(name.partition(".")[0] for name in leaves if _is_read(name, sections)))
        raise UserError(f"{key} has no effect on this command, which reads {readable}: leave it out.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        value = text
    annotation = leaves[key].annotation
    # The shell drops quotes, so `run=2024` could not be said otherwise: where text alone fits, it is text.
    for candidate in (value,) if isinstance(value, list | dict) else (value, text):
        with contextlib.suppress(TypeError):
            return convert(candidate, annotation)
    return _converted(key, value, annotation, COMMAND_LINE)


def _converted(key: str, value: Any, annotation: Any, source: str) -> Any:
    try:
        return convert(value, annotation)
    except TypeError:
        sentence = f"{key} must be of type {type_name(annotation)}, but {source} gives {_inline(value)}."
        raise UserError(sentence) from None


def _build(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    hints = typing.get_type_hints(cls)
    return cls(
        **{
            name: _build(hints[name], values, f"{prefix}{name}.") if _is_section(hints[name]) else values[prefix + name]
            for name in (field.name for field in dataclasses.fields(cls))
        }
    )


def _unknown(key: str, leaves: Mapping[str, Leaf], source: str) -> UserError:
    """The sentence for an unknown key, with the key most like it: similar as a whole, or of the same last name."""
    sections = {name.rpartition(".")[0] for name in leaves} - {""}
    last = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, [*leaves, *sections], n=1) or [
        name for name in leaves if name.endswith(f".{last}")
    ]
    advice = f"did you mean {' or '.join(near)}?" if near else "--help lists the known ones."
    return UserError(f"Unknown configuration key {key} from {source}: {advice}")


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def _has_section(leaves: Mapping[str, Leaf], key: str) -> bool:
    return any(name.startswith(f"{key}.") for name in leaves)


def _is_read(key: str, sections: Sequence[str] | None) -> bool:
    """Whether a command of these sections reads `key`; the root's own fields concern every command."""
    return sections is None or "." not in key or key.partition(".")[0] in sections


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _inline(value: Any) -> str:
    """A value as one line of YAML."""
    return " ".join(yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").split())


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice; plain YAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                problem = f"the key {name} is given twice, first in line {seen[name]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen[name] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)
