"""The shape that all commands share: arguments, help, and how errors become sentences and exit codes."""

import argparse
import dataclasses
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from calm_core import config
from calm_core.errors import ExitCode, UserError

Config = TypeVar("Config")

DEFAULT_CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"

INTERRUPTED = 130  # 128 + SIGINT, as shells count

OVERRIDE = re.compile(r"[\w.-]+=.*", re.DOTALL)  # no slash before the "=": `runs/lr=1/config.yaml` is a path


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are `UserError`s: for tools that take paths, run under `guard`."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments by a sentence."""
        raise UserError(f"{self.prog}: {message}; --help shows the usage.")


def run(
    doc: str | None,
    cls: type[Config],
    sections: Sequence[str],
    action: Callable[..., int | None],
    argv: Sequence[str] | None = None,
    default: Path | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> int:
    """Run `action(config, dry_run)` for `SCRIPT [CONFIG.yaml] [key=value ...] [--dry-run] [--help]`; the exit code.

    `doc` is the script's docstring, `cls` the root of the configuration and `sections` those of its sections that the
    script reads. Without a CONFIG.yaml the one at `default` is used, or the demo's. `options` are further ones,
    `--name` to what argparse takes; `action` gets their values by name. Errors end as `guard` says.
    """
    further = options or {}

    def command() -> int | None:
        shown = "".join(f" [{' '.join(filter(None, [flag, how.get('metavar')]))}]" for flag, how in further.items())
        parser = Parser(
            usage=f"%(prog)s [CONFIG.yaml] [key=value ...]{shown} [--dry-run] [--help]",
            description=doc,
            epilog=f"keys, their types, defaults and meanings:\n{config.describe(cls, sections)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
        parser.add_argument("--dry-run", action="store_true", help="print what would be done and start nothing")
        for flag, how in further.items():
            parser.add_argument(flag, **how)
        parsed = parser.parse_intermixed_args(argv)
        given = {name: value for name, value in vars(parsed).items() if name not in ("arguments", "dry_run")}
        overrides = [argument for argument in parsed.arguments if OVERRIDE.fullmatch(argument)]
        paths = [Path(argument) for argument in parsed.arguments if not OVERRIDE.fullmatch(argument)]
        if len(paths) > 1:
            raise UserError(f"{paths[1]} is a second configuration after {paths[0]}: give one, and key=value for more.")
        usual = default or DEFAULT_CONFIG
        path = paths[0] if paths else usual if usual.exists() else None
        return action(_with_source(config.load(cls, path, overrides, sections), path), parsed.dry_run, **given)

    return guard(command)


def _with_source(loaded: Config, path: Path | None) -> Config:
    """Note the file in a configuration that has a field `config_file`, unless it says where it is from already."""
    if getattr(loaded, "config_file", None) == "" and path is not None:
        return dataclasses.replace(loaded, config_file=str(path.absolute()))
    return loaded


def guard(function: Callable[[], int | None]) -> int:
    """Call `function` and return its exit code (None is 0), whatever happens.

    A `UserError` is one sentence on stderr and `ExitCode.USAGE`; under torchrun rank 0 alone prints it, so an error
    must reach every rank to be seen. An interrupt is 130; anything else prints its trace and is `ExitCode.FAILED`.
    """
    try:
        return int(function() or ExitCode.OK)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        return int(ExitCode.USAGE)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return int(ExitCode.FAILED)
