"""A run of an earlier version still loads, generates and trains: tests/fixtures/old_run, written by commit 917b3ef."""

import json
import shutil
from pathlib import Path

import pytest
from launching import ROOT

from calm_core import config
from calm_core.autoencoder.model import load_autoencoder
from calm_core.config.experiment import Experiment
from calm_core.distributed.topology import Topology
from calm_core.errors import ExitCode
from calm_core.inference.generate import continue_prompts
from calm_core.inference.load_model import load_for_inference
from calm_core.training.launch import run_calm
from calm_core.training.run_log import read_metrics

# What the version that wrote the run logged for its next two steps.
LOSSES = {25: 2.3273565769195557, 26: 2.3680055141448975}
NORMS = {25: 1.577521800994873, 26: 0.7458887696266174}


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "tests" / "fixtures" / "old_run", tmp_path / "run"))


def test_it_trains_on_as_it_would_have(old_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changes = [f"run={old_run}", "training.steps=26", "training.eval_every=0", "samples.while_training=false"]
    assert run_calm(config.load(Experiment, old_run / "config.yaml", changes)) == ExitCode.OK
    out, err = capfd.readouterr()
    assert "was None" not in out  # keys that its version did not have are as they were
    assert "resume: training.steps was 24, is now 26" in out
    assert not err
    steps = {record["step"]: record for record in read_metrics(old_run / "calm" / "metrics.jsonl", "train")}
    assert sorted(steps) == list(range(1, 27))
    for step in (25, 26):
        assert steps[step]["loss"] == pytest.approx(LOSSES[step], rel=1e-5)
        assert steps[step]["gradient_norm"] == pytest.approx(NORMS[step], rel=1e-4)


def test_its_autoencoder_is_the_one_that_its_manifest_names(old_run: Path) -> None:
    model = load_autoencoder(old_run / "autoencoder" / "frozen")
    assert (model.k, model.config.latent) == (4, 8)
    assert (
        model.content_hash == json.loads((old_run / "chunks" / "manifest.json").read_text())["made_from"]["autoencoder"]
    )


def test_it_continues_its_prompts_as_it_did(old_run: Path, topology: Topology) -> None:
    experiment = config.load(Experiment, old_run / "config.yaml", [f"run={old_run}"])
    loaded = load_for_inference(old_run, topology.device)
    texts = [sample["tokens"] for sample in continue_prompts(loaded, experiment.samples, experiment.seed)]
    assert texts == [sample["tokens"] for sample in json.loads((old_run / "samples.json").read_text())]
