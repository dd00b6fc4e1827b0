"""Configuration: typed dataclasses, filled from YAML files and the command line; no torch here."""

from calm_core.config.schema import (
    convert,
    describe,
    differences,
    dump,
    flatten,
    load,
    option,
    read_yaml,
    save,
    to_dict,
    to_yaml,
)

__all__ = [
    "convert",
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
]
