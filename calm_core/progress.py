"""Progress of long work: a bar on a terminal, otherwise a plain line every few seconds."""

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """`with Progress("encoding", total, "tokens") as progress:` and then `progress.advance(n, "a note")`, on stderr."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0):
        """Start at `done` of `total` units."""
        self._label, self._total, self._unit = label, total, unit
        self._done = self._begin = done
        self._started = self._printed = time.monotonic()
        self._note = ""
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=label, unit=f" {unit}", unit_scale=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._done > self._begin:
            self._print()

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count `amount` more units as done; show the progress when due."""
        self._done += amount
        self._note = note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(amount)
        elif time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        rate = (self._done - self._begin) / max(self._printed - self._started, 1e-9)
        line = f"{self._label}: {self._done:,} of {self._total:,} {self._unit}, {rate:,.0f} a second"
        print(f"{line}, {self._note}" if self._note else line, file=sys.stderr, flush=True)
