"""One configuration key changes the head: each trains and is scored through the path of the real command."""

from pathlib import Path

import pytest

from calm_core import config
from calm_core.errors import ExitCode
from calm_core.experiment import Experiment
from calm_core.model.config import HEADS
from calm_core.training.launch import run_calm
from calm_core.training.run_log import read_metrics


@pytest.mark.parametrize("kind", HEADS)
def test_a_run_of_two_steps_with_an_evaluation(tiny: Path, kind: str) -> None:
    changes = [f"run={tiny}", f"head.kind={kind}", "training.steps=2", "training.eval_every=2"]
    if kind == "softmax":
        (tiny / "chunks").rename(tiny / "no chunks")
        (tiny / "autoencoder").rename(tiny / "no autoencoder")
    experiment = config.load(Experiment, tiny / "config.yaml", changes)
    assert run_calm(experiment) == ExitCode.OK
    metrics = tiny / "calm" / "metrics.jsonl"
    assert [record["step"] for record in read_metrics(metrics, "train")] == [1, 2]
    (scored,) = read_metrics(metrics, "eval")
    assert [n for n in range(1, 5) if f"brier_{n}" in scored] == [1, 2, 3, 4]
    assert scored["rollout_chunks"] == (4 if kind == "softmax" else 1)
    assert -1 <= scored["brier_1"] <= 1
    assert scored["loss"] > 0
    assert scored["scored_positions"] > 0
