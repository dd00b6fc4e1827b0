"""The shape that all commands share: arguments, help, and how errors become sentences and exit codes.

Output never fails a command: a closed pipe or a full disk costs the output, not the work.
"""

import argparse
import dataclasses
import os
import re
import shutil
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

from calm_core import config
from calm_core.config.load_config import ROOT, user_path
from calm_core.errors import ExitCode, UserError

Config = TypeVar("Config")

DEFAULT_CONFIG = ROOT / "configs" / "demo.yaml"
PRINTING_SECONDS = 10.0  # for which the other ranks leave rank 0 to print an error that all of them raise

OVERRIDE = re.compile(r"[\w.-]+=.*", re.DOTALL)  # no slash before the "=": `runs/lr=1/config.yaml` is a path


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are `UserError`s, and whose paths may begin with `~` or `$NAME`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("type", Path, user_path)

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
    """Run `action(config, dry_run)` for `SCRIPT [CONFIG.yaml] [key=value ...] [--dry-run] [--help]`.

    Args:
        doc: the script's docstring.
        cls: the root of the configuration.
        sections: those of its sections that the script reads.
        action: what the script does; its values of `options` come by name.
        argv: the arguments, by default those of the process.
        default: the file to use where no CONFIG.yaml is given; by default the demo's.
        options: further options, `--name` to the keywords of `add_argument`.

    Returns:
        The exit code, as `guard` gives it.
    """
    further = options or {}

    def command() -> int | None:
        parsed = _parser(doc, cls, sections, further).parse_intermixed_args(argv)
        given = {name: value for name, value in vars(parsed).items() if name not in ("arguments", "dry_run")}
        overrides = [argument for argument in parsed.arguments if OVERRIDE.fullmatch(argument)]
        paths = [user_path(argument) for argument in parsed.arguments if not OVERRIDE.fullmatch(argument)]
        if len(paths) > 1:
            raise UserError(f"{paths[1]} is a second configuration after {paths[0]}: give one, and key=value for more.")
        usual = default or DEFAULT_CONFIG
        path = paths[0] if paths else usual if usual.exists() else None
        loaded = _with_source(config.load(cls, path, overrides, sections), path)
        if not paths:
            _announce(path, usual)
        return action(loaded, parsed.dry_run, **given)

    return guard(command)


def _parser(doc: str | None, cls: type, sections: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> Parser:
    shown = "".join(f" [{' '.join(filter(None, [flag, how.get('metavar')]))}]" for flag, how in options.items())
    width = shutil.get_terminal_size((0, 0)).columns  # 0 where there is no terminal: lines stay whole, for grep
    parser = Parser(
        usage=f"%(prog)s [CONFIG.yaml] [key=value ...]{shown} [--dry-run] [--help]",
        description=_wrapped(doc or "", width),
        epilog=f"keys, their types, defaults and meanings:\n{config.describe(cls, sections, width)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and start nothing")
    for flag, how in options.items():
        parser.add_argument(flag, **how)
    return parser


def _wrapped(text: str, width: int) -> str:
    """Text of which every line is wrapped to `width` by itself; 0 leaves them whole."""
    if not width:
        return text
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent=" " * (len(line) - len(line.lstrip())))
        for line in text.split("\n")
    )


def _announce(path: Path | None, usual: Path) -> None:
    """Say which configuration is used where none is given; a comment, since `--dry-run` prints YAML below it."""
    if os.environ.get("RANK", "0") == "0":
        used = path or f"the built-in defaults, since {usual} is not there"
        print(f"# no configuration is given: using {used}", flush=True)


def _with_source(loaded: Config, path: Path | None) -> Config:
    """Note the file in a configuration that has a field `config_file`, unless it already names one."""
    if getattr(loaded, "config_file", None) == "" and path is not None:
        return dataclasses.replace(loaded, config_file=str(path.absolute()))
    return loaded


def guard(function: Callable[[], int | None]) -> int:
    """Call `function` and return its exit code (None is 0), whatever happens.

    A `UserError` is one sentence on stderr and `ExitCode.USAGE`. Every rank prints its own, with its number above
    rank 0, unless all ranks raise the same one: then rank 0 prints it. Any other error prints its traceback and is
    `ExitCode.FAILED`. Output that cannot be written, because its reader is gone or the disk is full, is dropped.
    """
    with failsafe_output():
        code = _exit_code(function)
    if _is_one_of_several_ranks():  # it failed: closing its process groups could wait for ranks that wait for it
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)
    return code


def _exit_code(function: Callable[[], int | None]) -> int:
    try:
        return int(function() or ExitCode.OK)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not error.on_all_ranks:
            print(error if rank == "0" else f"rank {rank}: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(PRINTING_SECONDS)  # torchrun ends rank 0 as soon as another rank has ended
        return int(ExitCode.USAGE)
    except KeyboardInterrupt:
        return int(ExitCode.INTERRUPTED)
    except Exception:
        traceback.print_exc()
        return int(ExitCode.FAILED)


def _is_one_of_several_ranks() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return bool(distributed and distributed.is_initialized() and distributed.get_world_size() > 1)


class FailsafeStream:
    """A text stream that drops what it cannot write, and everything after it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or drop."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each, or drop."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, or drop."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Send this and all further output to /dev/null; say so on stderr, unless the reader chose to leave."""
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
        if not isinstance(error, BrokenPipeError) and sys.stderr is not self:
            print(f"standard output cannot be written ({error.strerror}): the rest is not shown", file=sys.stderr)


@contextmanager
def failsafe_output() -> Iterator[None]:
    """Make stdout and stderr failsafe in this block, and able to show any text in any encoding."""
    _open_standard_files()
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = FailsafeStream(before[0]), FailsafeStream(before[1])
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _open_standard_files() -> None:
    """Open /dev/null for standard files that the parent closed, so that no file of ours gets their number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8"))  # noqa: SIM115 - for the life of the process
