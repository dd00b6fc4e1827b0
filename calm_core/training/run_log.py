"""Where the numbers of a run go: metrics.jsonl always, the terminal, and wandb on top."""

import json
import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from calm_core.training.config import TrainingConfig
from calm_core.training.run_folder import RunFolder


class RunLog:
    """Writes one record per line of metrics.jsonl, under the same names to wandb, and a short line for a person.

    A record is {"step": N, "kind": "train" | "eval" | "sample" | "event", name: value, ...}; null is a number that was
    not finite. After a resume the records of steps that are about to be done again are dropped, so a step has one of a
    kind. Events stay, with the time they were written at: a start or a refused update has happened, and may again.
    """

    def __init__(
        self, folder: RunFolder, start_step: int, name: str, config: TrainingConfig, resolved: dict[str, Any]
    ) -> None:
        folder.path.mkdir(parents=True, exist_ok=True)
        _drop_after(folder.metrics, start_step)
        self._file = open(folder.metrics, "a")  # noqa: SIM115 - open for the whole run
        self._wandb = _start_wandb(folder, name, config, resolved)

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Record `values` at `step`."""
        values = finite(values)
        if kind == "event":
            values["time"] = round(time.time(), 3)
        self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            numbers = {f"{kind}/{name}": v for name, v in values.items() if isinstance(v, int | float)}
            try:
                self._wandb.log(numbers, step=step)
            except Exception as error:
                self._wandb = None
                print(f"wandb stopped taking metrics ({error}); metrics.jsonl goes on.", file=sys.stderr)

    def close(self) -> None:
        """Finish the records."""
        with suppress(OSError):  # each line was flushed when it was written: one that did not fit has said so then
            self._file.close()
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:
                print(f"wandb did not finish ({error}); metrics.jsonl is complete.", file=sys.stderr)


def finite(content: Any) -> Any:
    """What is to become JSON, which knows no NaN and no infinity, with None for each number that is not finite."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_metrics(path: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind in a metrics.jsonl, in order."""
    return [record for record in read_records(path) if record["kind"] == kind]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file of one a line, in order; a line cut short by a crash is left out, and NaN is None."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):
            records.append(json.loads(line, parse_constant=lambda name: None))
    return records


def _drop_after(metrics: Path, step: int) -> None:
    """Keep all events, and the other records up to `step`, the last one that a checkpoint holds."""
    if not metrics.exists():
        return
    lines = []
    for line in metrics.read_text().splitlines():
        with suppress(ValueError):  # the last line of a run that was killed
            record = json.loads(line)
            if record["kind"] == "event" or record["step"] <= step:
                lines.append(line + "\n")
    partial = metrics.with_suffix(".partial")
    partial.write_text("".join(lines))
    partial.replace(metrics)


def _start_wandb(folder: RunFolder, name: str, config: TrainingConfig, resolved: dict[str, Any]) -> Any:
    if config.wandb == "disabled":
        return None
    try:
        import wandb

        return wandb.init(
            project="calm",
            name=f"{folder.path.parent.name}/{name}",
            id=_run_id(folder.path / "wandb_id"),
            resume="allow",
            dir=str(folder.path),
            mode=config.wandb,
            group=config.wandb_group or None,
            job_type=name,
            config=resolved,
            settings=wandb.Settings(silent=True, console="off", init_timeout=60, x_disable_stats=True),
        )
    except Exception as error:  # a tracker that fails must not take the run with it
        print(f"wandb is off ({error}); metrics.jsonl has everything.", file=sys.stderr)
        return None


def _run_id(path: Path) -> str:
    """An id that stays with the folder, so that a resumed run goes on in wandb instead of starting another."""
    if not path.exists():
        path.write_text(uuid4().hex[:8])
    return path.read_text()
