"""Where two runs part: the first step and key at which their records differ."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calm_core.errors import UserError
from calm_core.training.run_log import read_metrics

# What a machine does to a run, and not the run itself.
_OF_THE_MACHINE = {"tokens_per_second", "mfu", "memory_gib", "data_wait"}
KINDS = ("train", "eval")


@dataclass(frozen=True)
class Difference:
    """The first difference of two runs: `ours` and `theirs` are the values of `key` there, None where there is none."""

    step: int
    kind: str
    key: str
    ours: Any
    theirs: Any


def first_difference(one: Path, other: Path, tolerance: float) -> Difference | None:
    """The first difference between the metrics of two run folders, None if they agree as far as both have come.

    Args:
        one: folder of a training run.
        other: likewise.
        tolerance: numbers agree when they differ by at most this share of the larger; 0 wants them equal.

    Raises:
        UserError: if a folder holds no metrics, or the runs have no step in common.
    """
    ours, theirs = _records(one), _records(other)
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise UserError(f"{one} and {other} have no recorded step in common: set the same training.log_every.")
    found = (
        Difference(step, KINDS[kind], *values)
        for step, kind in common
        for values in _differing(ours[step, kind], theirs[step, kind], tolerance)
    )
    return next(found, None)


def _records(run: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """The records by step, then kind."""
    path = run / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{run} holds no metrics.jsonl: give the folder of a training run, such as runs/demo/calm.")
    return {(r["step"], number): r for number, kind in enumerate(KINDS) for r in read_metrics(path, kind)}


def _differing(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> Iterator[tuple[str, Any, Any]]:
    for key in [*one, *(key for key in other if key not in one)]:
        ours, theirs = one.get(key), other.get(key)
        if key not in _OF_THE_MACHINE and not _agree(ours, theirs, tolerance):
            yield key, ours, theirs


def _agree(one: Any, other: Any, tolerance: float) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=tolerance)
    return one == other
