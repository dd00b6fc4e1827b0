"""Configurations as plain values: saved as YAML, compared, and made independent of the folder they were read in."""

import dataclasses
import math
import os
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from calm_core.config.schema import PathText, is_section
from calm_core.io import write_text

Config = TypeVar("Config")


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


def with_absolute_paths(config: Config) -> Config:
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


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The (dotted key, value) pairs of a nested mapping."""
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
