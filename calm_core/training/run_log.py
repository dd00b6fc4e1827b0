"""Where the numbers of a run go: metrics.jsonl always, the terminal, and wandb on top."""

import json
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

from calm_core.training.config import TrainingConfig
from calm_core.training.run_folder import RunFolder


class RunLog:
    """Writes one record per line of metrics.jsonl, under the same names to wandb, and a short line for a person.

    A record is {"step": N, "kind": "train" | "eval" | "sample" | "event", name: value, ...}. After a resume the lines
    of steps that are about to be done again are dropped, so a step has one record.
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
        self._file.close()
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:
                print(f"wandb did not finish ({error}); metrics.jsonl is complete.", file=sys.stderr)


def read_metrics(path: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind in a metrics.jsonl, in order; a line cut short by a crash is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["kind"] == kind:
            records.append(record)
    return records


def _drop_after(metrics: Path, step: int) -> None:
    """Keep the records up to `step`, the last one that a checkpoint holds."""
    if not metrics.exists():
        return
    lines = []
    for line in metrics.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
        except ValueError:
            continue  # the last line of a run that was killed
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
