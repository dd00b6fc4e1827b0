"""Configuration: typed dataclasses, filled from YAML files and the command line; no torch here."""

from calm_core.config.load_config import (
    changes,
    convert,
    differences,
    dump,
    flatten,
    load,
    read_yaml,
    save,
    to_dict,
    to_yaml,
    with_absolute_paths,
)
from calm_core.config.schema import check, decides, describe, option

__all__ = [
    "changes",
    "check",
    "convert",
    "decides",
    "describe",
    "differences",
    "dump",
    "flatten",
    "load",
    "option",
    "read_yaml",
    "save",
    "to_dict",
    "to_yaml",
    "with_absolute_paths",
]
