"""Standard output and error that never fail a command: a closed pipe or a full disk costs the output, not the work."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


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
    """Open /dev/null for standard files that the parent closed, lest a file of ours gets their number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8"))  # noqa: SIM115 - for the life of the process
