"""What a stage of a run leaves behind on a cluster: RUN/slurm/STAGE/, with one folder an attempt.

journal.jsonl           one line an event: start, end, requeue, ...
latest -> JOB.RESTART   the last attempt
JOB.RESTART/            rank-0000.log ..., ranks/0.json ... (how each ended), record.json, config.yaml
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calm_core.data.manifest import read_json, write_json
from calm_core.parallel.checkpoint_folder import list_checkpoints

# Of the environment, what decides how a job runs; nothing that may hold a secret.
RECORDED = ("SLURM_", "NCCL_", "CALM_", "CUDA_", "OMP_", "GLOO_", "TORCH_", "UCX_", "FI_")
BUILDING = "building"  # the journal of `data.builder`, which needs packages that the host may lack


class StageRecords:
    """The folder of a stage; of one task, if an array shares the stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._journal = folder / "journal.jsonl"

    @classmethod
    def of(cls, run: Path, stage: str, task: int | None) -> "StageRecords":
        """Where they lie for a stage of a run."""
        return cls(run / "slurm" / (stage if task is None else f"{stage}-{task}"))

    def note(self, job: str, restart: int, event: str, **values: Any) -> None:
        """Append an event to the journal."""
        line = {"time": round(time.time(), 3), "job": job, "restart": restart, "event": event, **values}
        with open(self._journal, "a") as file:
            file.write(json.dumps(line) + "\n")

    def journal(self) -> list[dict[str, Any]]:
        """All events so far."""
        return [json.loads(line) for line in self._journal.read_text().splitlines()] if self._journal.exists() else []

    def attempt(self, name: str) -> Path:
        """The folder of a new attempt, which `latest` then points to."""
        folder = self.folder / name
        (folder / "ranks").mkdir(parents=True, exist_ok=True)
        pointer = self.folder / "latest.new"
        pointer.unlink(missing_ok=True)
        pointer.symlink_to(name)
        pointer.replace(self.folder / "latest")
        return folder


def endings(attempt: Path, world: int) -> list[dict[str, Any]]:
    """How the ranks of an attempt ended, as far as they could still say."""
    paths = [attempt / "ranks" / f"{rank}.json" for rank in range(world)]
    return [read_json(path) for path in paths if path.exists()]


def write_record(attempt: Path, root: Path, plan: Mapping[str, Any], nodes: tuple[str, ...]) -> None:
    """What ran, in what: code version, configuration, software, nodes, environment."""
    (attempt / "config.yaml").write_text(plan["config"])
    content = {
        **{name: plan[name] for name in ("command", "product", "training", "steps", "share", "software")},
        "code": _code_version(root),
        "host": platform.platform(),
        "nodes": list(nodes),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(RECORDED)},
    }
    write_json(attempt / "record.json", content)


def progress_of(plan: Mapping[str, Any]) -> int:
    """How far a stage has come, in a number that grows: the newest checkpoint's step, or what is done of its product.

    The journal of a store that is being built says what is done; of an array's task, its share alone counts.
    """
    if plan["training"]:
        found = list_checkpoints(Path(plan["training"]) / "checkpoints")
        return int(found[-1].name.removeprefix("step-")) if found else 0
    product, (index, count) = Path(plan["product"]), plan.get("share", (0, 1))
    parts = [int(path.name.partition("-")[0]) for path in (product.parent / BUILDING).glob("*-*.json")]
    return sum(part % count == index for part in parts) + product.exists()


def _code_version(root: Path) -> str:
    """The commit, `+changes` if the files differ from it; empty without git."""
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
