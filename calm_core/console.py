"""The command `calm`: `calm NAME ...` runs the script of that name, `calm generate` being pretrain/generate.py."""

import ast
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from calm_core.config import command
from calm_core.config.load_config import ROOT
from calm_core.errors import UserError

ALIASES = {"train": "train-calm"}


def scripts() -> dict[str, Path]:
    """All scripts by their names, with dashes for underscores, and by their aliases."""
    paths = [path for folder in ("data_prep", "pretrain") for path in sorted((ROOT / folder).glob("*.py"))]
    named = {path.stem.replace("_", "-"): path for path in paths}
    return named | {alias: named[name] for alias, name in ALIASES.items() if name in named}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script that the first argument names; its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in ([], ["-h"], ["--help"]):
        return command.guard(_print_usage)
    if arguments[0] not in scripts():
        return command.guard(lambda: _refuse(arguments[0]))
    sys.argv = arguments
    runpy.run_path(str(scripts()[arguments[0]]), run_name="__main__")
    return 0


def _print_usage() -> None:
    print("usage: calm NAME [arguments of the script; --help lists them]\n")
    for name, path in scripts().items():
        summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        print(f"{name:<18} {summary}")


def _refuse(name: str) -> None:
    known = ", ".join(scripts()) or f"none, since {ROOT} holds no scripts"
    raise UserError(f"calm: {name} is not a command; these are: {known}.")


if __name__ == "__main__":
    raise SystemExit(main())
