"""Training runs of the tiny model through the real command's path, in this process, and what they have left."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from calm_core import config
from calm_core.checkpoint.folder import list_checkpoints, open_checkpoint
from calm_core.config.experiment import Experiment
from calm_core.errors import ExitCode
from calm_core.report.run_page import write_run_page
from calm_core.training.launch import run_calm
from calm_core.training.run_log import read_metrics

warnings.filterwarnings("ignore", category=DeprecationWarning)


def train(folder: Path, *overrides: str) -> ExitCode:
    return run_calm(config.load(Experiment, folder / "config.yaml", [f"run={folder}", *overrides]), write_run_page)


def steps_saved(folder: Path) -> list[int]:
    return [open_checkpoint(path).step for path in list_checkpoints(folder / "calm" / "checkpoints")]


def tensors_of(folder: Path, step: int) -> dict[str, str]:
    """Checksums of the files that hold the tensors of a checkpoint."""
    return open_checkpoint(folder / "calm" / "checkpoints" / f"step-{step}").checksums


def curve(folder: Path) -> list[tuple[int, float, float, float, int]]:
    names = ("step", "loss", "gradient_norm", "learning_rate", "samples")
    return [tuple(record[n] for n in names) for record in read_metrics(folder / "calm" / "metrics.jsonl", "train")]


def events(folder: Path) -> list[tuple[int, str]]:
    """The events of a run and their steps, without its checkpoints."""
    found = read_metrics(folder / "calm" / "metrics.jsonl", "event")
    return [(event["step"], event["event"]) for event in found if event["event"] != "checkpoint"]


@contextmanager
def forward_step_of(monkeypatch: pytest.MonkeyPatch, step: Any) -> Iterator[None]:
    """Within the block, runs use `step(original, task, micro_batches, model)` for CALM's forward step."""
    import calm_core.training.calm_task as module

    original = module.CalmTask.forward_step
    with monkeypatch.context() as patch:
        patch.setattr(module.CalmTask, "forward_step", lambda task, *given: step(original, task, *given))
        yield
