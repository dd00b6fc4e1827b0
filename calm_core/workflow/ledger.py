"""`stages.json` of a run: the seconds that each stage took, and the inputs and outputs of its last success.

It needs no package beyond the standard library: a Slurm job reads it on a host that may have none.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calm_core.io import new_hash, read_json, write_json


class Ledger:
    """The file `stages.json`: for each stage its seconds over all attempts, and the stamp of its last success."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stages: dict[str, dict[str, Any]] = read_json(path) if path.exists() else {}

    def seconds(self, stage: str) -> float:
        """Seconds spent on a stage so far, including attempts that failed or were killed."""
        return self._stages.get(stage, {}).get("seconds", 0.0)

    def is_finished(self, stage: str, stamp: str | None) -> bool:
        """Whether the stage last succeeded with the inputs and products that `stamp` was computed from."""
        return stamp is not None and self._stages.get(stage, {}).get("stamp") == stamp

    def note(self, stage: str, seconds: float, stamp: str | None = None) -> None:
        """Record the seconds of a stage so far and, once it has succeeded, its stamp."""
        self._stages[stage] = {"seconds": round(seconds, 1), "stamp": stamp}
        write_json(self._path, self._stages)


def stamp(inputs: str, products: Sequence[Path]) -> str | None:
    """A hash of `inputs` and of the files' contents; None if a file is missing.

    The files are manifests, which name the artefacts by content hashes, so any change to an artefact changes the stamp.
    """
    digest = new_hash()
    digest.update(inputs.encode())
    for path in products:
        if not path.is_file():
            return None
        digest.update(path.read_bytes())
    return digest.hexdigest()
