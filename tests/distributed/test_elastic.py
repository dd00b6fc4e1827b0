"""One run on changing layouts is the run on one process: each command resumes what the one before has left."""

import shutil
from pathlib import Path

import pytest
from launching import ROOT, launch

from calm_core import config
from calm_core.config.experiment import Experiment
from calm_core.errors import ExitCode
from calm_core.training.launch import run_calm
from calm_core.training.run_log import first_difference

SCRIPT = ROOT / "pretrain" / "train_calm.py"
TOLERANCE = 1e-5  # relative, of loss and gradient norm in float32; counts are equal at any tolerance below 1 of them


@pytest.mark.slow
def test_a_run_moves_between_layouts(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tensor x sequence parallel, then pipeline, then data parallel with another micro-batch, then one process."""
    whole = Path(shutil.copytree(tiny, tiny.with_name("whole")))
    last = ["training.steps=8"]
    assert run_calm(config.load(Experiment, whole / "config.yaml", [f"run={whole}", *last])) == ExitCode.OK
    layouts = (
        ["parallel.tensor=2", "parallel.sequence=true", "training.steps=2"],
        ["parallel.pipeline=2", "training.steps=4"],
        ["training.micro_batch=4", "training.steps=6"],
    )
    for overrides in layouts:
        launch(2, SCRIPT, tiny / "config.yaml", f"run={tiny}", *overrides)
    assert run_calm(config.load(Experiment, tiny / "config.yaml", [f"run={tiny}", *last])) == ExitCode.OK
    assert first_difference(tiny / "calm", whole / "calm", TOLERANCE) is None
    assert first_difference(tiny / "calm", whole / "calm", 0.0) is not None  # in the last digits: not the same process
