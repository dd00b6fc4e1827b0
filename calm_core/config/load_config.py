"""Configurations filled from defaults, a YAML file and `a.b=c` overrides; written as YAML, compared, made absolute.

Every mistake of the user is a one-sentence error.
"""

import contextlib
import dataclasses
import difflib
import math
import os
import re
import sysconfig
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from calm_core.config.schema import (
    Leaf,
    PathText,
    flatten_schema,
    inline,
    is_read,
    is_section,
    require_in_bounds,
    type_name,
)
from calm_core.errors import UserError
from calm_core.io import write_text

CHECKOUT = Path(__file__).parents[2]

# Where the scripts and configurations are: a wheel puts them below the environment that it is installed in.
ROOT = CHECKOUT if (CHECKOUT / "pretrain").is_dir() else Path(sysconfig.get_path("data")) / "share" / "calm"

T = TypeVar("T")

# YAML 1.1 reads `3e-4` as text: a float needs its dot there.
FLOAT_TEXT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

# Choices of these names, unquoted, are booleans in YAML 1.1.
BOOLEAN_NAMES = {False: ("off", "no", "false"), True: ("on", "yes", "true")}

VARIABLE = re.compile(r"\$(\w+|\{\w+\})")

# Commas between the items of a list, not those within the brackets of a glob.
ITEM_SEPARATOR = re.compile(r",(?![^\[\]]*\])")

COMMAND_LINE = "the command line"


def load(cls: type[T], path: Path | None, overrides: Sequence[str], sections: Sequence[str] | None = None) -> T:
    """The configuration `cls` from its defaults, the YAML file at `path`, then the `a.b=c` overrides, typed strictly.

    With `sections`, an override may only touch those sections and the root's own fields; the file may hold any section
    of `cls`, so that one file serves every command.

    Raises:
        UserError: for what cannot be read, an unknown key, a value of the wrong type or outside its bounds, and values
            that do not fit together.
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


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, {} for an empty one.

    Raises:
        UserError: if the file is missing or invalid, or has a key twice.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except OSError as error:
        raise UserError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        hint = "; put quotes around text that begins with * or &" if "alias" in str(error.context) else ""
        raise UserError(f"{path} is not valid YAML: {where}{error.problem}{hint}.") from error
    except (yaml.YAMLError, ValueError) as error:  # unreadable characters, an impossible date
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path} holds {inline(content)}, but a configuration needs `key: value` lines.")
    return content or {}


def convert(value: Any, annotation: Any) -> Any:
    """A value, as YAML gives it, as the type `annotation`.

    An int, and text such as `3e-4`, is a float; a bool is not a number, but it is a choice named like it; a dataclass
    in a list is a mapping of its fields; a single value is a list of one.

    Raises:
        TypeError: it is not of that type.
        ValueError: it is, but it cannot be used; the message is the end of a sentence.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation == PathText:
        return _expanded(convert(value, str))
    if origin in (typing.Union, types.UnionType):
        return _convert_to_first(value, arguments)
    if origin is Literal:
        return _choice(value, arguments)
    if origin is list and value is not None:
        items = [convert(item, arguments[0]) for item in (value if isinstance(value, list) else [value])]
        if arguments[0] == PathText and "" in items:
            raise ValueError("holds an empty path")
        return items
    if origin is dict and isinstance(value, dict):
        return {convert(key, arguments[0]): convert(item, arguments[1]) for key, item in value.items()}
    if is_section(annotation) and isinstance(value, dict):
        hints = typing.get_type_hints(annotation, include_extras=True)
        if not value.keys() <= hints.keys():
            raise TypeError
        return annotation(**{name: convert(item, hints[name]) for name, item in value.items()})
    if annotation is float and (type(value) in (int, float) or _is_float_text(value)):
        return _finite(value)
    if type(value) is annotation:
        return value
    raise TypeError


def _is_float_text(value: Any) -> bool:
    return isinstance(value, str) and FLOAT_TEXT.fullmatch(value) is not None


def _finite(value: float | str) -> float:
    with contextlib.suppress(OverflowError):
        number = float(value)
        if math.isfinite(number):
            return number
    raise TypeError


def _choice(value: Any, choices: Sequence[Any]) -> Any:
    names = BOOLEAN_NAMES[value] if isinstance(value, bool) else ()
    for choice in choices:
        if (value == choice and type(value) is type(choice)) or choice in names:
            return choice
    raise TypeError


def _convert_to_first(value: Any, annotations: Sequence[Any]) -> Any:
    for annotation in annotations:
        with contextlib.suppress(TypeError):
            return convert(value, annotation)
    raise TypeError


def _expanded(path: str) -> str:
    """A path with its `~`, `$NAME` and `${NAME}` replaced."""
    expanded = os.path.expanduser(os.path.expandvars(path))
    if unset := VARIABLE.search(expanded):
        raise ValueError(f"names the variable {unset[0]}, which is not set")
    if expanded.startswith("~"):
        raise ValueError("names a home folder that does not exist")
    return expanded


def user_path(text: str) -> Path:
    """A path that a user gives to a tool, with `~` and `$NAME` replaced."""
    try:
        return Path(_expanded(text))
    except ValueError as error:
        raise UserError(f"{text} {error}.") from None


def _checked(
    mapping: Mapping[Any, Any], leaves: Mapping[str, Leaf], source: str, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """The (dotted key, converted value) pairs of a nested mapping."""
    for name, value in mapping.items():
        key = f"{prefix}{name}"
        if key in leaves:
            yield key, _converted(key, value, leaves[key], source)
        elif not _has_section(leaves, key):
            raise _unknown(key, leaves, source)
        elif isinstance(value, dict):
            yield from _checked(value, leaves, source, f"{key}.")
        elif value is not None:  # a section whose lines are all commented out is null
            raise UserError(f"{key} in {source} is a section, not the value {inline(value)}: give its fields below it.")


def _override(key: str, text: str, leaves: Mapping[str, Leaf], sections: Sequence[str] | None) -> Any:
    """The converted value of one `key=text`."""
    if _has_section(leaves, key):
        raise UserError(f"{key} on {COMMAND_LINE} is a section: set its fields one by one, as {key}.field=value.")
    if key not in leaves:
        raise _unknown(key, leaves, COMMAND_LINE)
    if not is_read(key, sections):
        readable = ", ".join(dict.fromkeys(name.partition(".")[0] for name in leaves if is_read(name, sections)))
        raise UserError(f"{key} has no effect on this command, which reads {readable}: leave it out.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        value = text
    leaf = leaves[key]
    for candidate in _readings(value, text):
        try:
            convert(candidate, leaf.annotation)
        except (TypeError, ValueError):
            continue
        return _converted(key, candidate, leaf, COMMAND_LINE)
    return _converted(key, value, leaf, COMMAND_LINE)


def _readings(value: Any, text: str) -> Iterator[Any]:
    """What an override can mean: its YAML, its items where globs make YAML of something else, its plain text."""
    bracketed = text.startswith("[") and text.endswith("]")
    if bracketed and any(wildcard in text[1:-1] for wildcard in "*?["):
        if isinstance(value, list):
            yield value
        yield [item.strip().strip("'\"") for item in ITEM_SEPARATOR.split(text[1:-1])]
        return
    yield value
    # The shell drops quotes, so there is no other way to write `run=2024`: where only text is allowed, it is text.
    if not isinstance(value, list | dict):
        yield text


def _converted(key: str, value: Any, leaf: Leaf, source: str) -> Any:
    try:
        converted = convert(value, leaf.annotation)
    except ValueError as error:
        raise UserError(f"{key}={inline(value)} {error}.") from None
    except TypeError:
        raise UserError(_wrong_type(key, value, leaf.annotation, source)) from None
    if leaf.annotation == PathText and leaf.default and not converted:
        raise UserError(f"{key} is empty: give a path, such as {leaf.default}.")
    require_in_bounds(key, converted, leaf.bounds)
    return converted


def _wrong_type(key: str, value: Any, annotation: Any, source: str) -> str:
    kind, hint = type_name(annotation), ""
    if isinstance(value, float) and not math.isfinite(value):
        kind = f"{kind}, finite"
    elif not isinstance(value, str | list | dict | None) and kind in ("str", "path", "list[str]", "list[path]"):
        hint = " without quotes: put it in quotes"
    return f"{key} must be of type {kind}, but {source} gives {inline(value)}{hint}."


def _build(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    hints = typing.get_type_hints(cls)
    return cls(
        **{
            name: _build(hints[name], values, f"{prefix}{name}.") if is_section(hints[name]) else values[prefix + name]
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


def _has_section(leaves: Mapping[str, Leaf], key: str) -> bool:
    return any(name.startswith(f"{key}.") for name in leaves)


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
    """Write the resolved configuration as YAML, its paths absolute, atomically."""
    write_text(path, to_yaml(with_absolute_paths(config)))


def with_absolute_paths(config: T) -> T:
    """The configuration with its paths absolute, so that it means the same in every working folder."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    return dataclasses.replace(
        config, **{name: _absolute(getattr(config, name), annotation) for name, annotation in hints.items()}
    )


def _absolute(value: Any, annotation: Any) -> Any:
    if is_section(annotation):
        return with_absolute_paths(value)
    if typing.get_origin(annotation) is list:
        return [_absolute(item, typing.get_args(annotation)[0]) for item in value]
    # `package:NAME` and URLs name no file.
    if annotation == PathText and value and ":" not in value.partition("/")[0]:
        return os.path.abspath(value)
    return value


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """All (dotted key, old value, new value) that differ between two nested dicts; None where a key is absent."""
    before, after = dict(flatten(old)), dict(flatten(new))
    return [(key, before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key)]


def changes(cls: type, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """`differences` of settings of `cls`, without fields that `old` does not have and that have their default in `new`.

    An earlier version did not have such a field, and what it did is the default.
    """
    known, leaves = dict(flatten(old)), flatten_schema(cls)

    def is_new(key: str) -> bool:
        names = key.split(".")
        return not any(".".join(names[:count]) in known for count in range(1, len(names) + 1))

    return [
        (key, before, after)
        for key, before, after in differences(old, new)
        if not (is_new(key) and key in leaves and after == leaves[key].default)
    ]


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The (dotted key, value) pairs of a nested mapping."""
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
