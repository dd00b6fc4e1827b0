"""The configurations that are shipped."""

from dataclasses import asdict
from pathlib import Path

import pytest
from launching import ROOT

from calm_core import config
from calm_core.experiment import Experiment
from calm_core.training.launch import print_plan

FILES = sorted((ROOT / "configs").glob("*.yaml"))
OURS = "our choice"
SECTIONS = ("data", "model", "head", "parallel", "training", "plan")


def load(name: str) -> Experiment:
    return config.load(Experiment, ROOT / "configs" / f"{name}.yaml", [])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_can_be_planned(path: Path, capsys: pytest.CaptureFixture) -> None:
    experiment = config.load(Experiment, path, [])
    assert print_plan(experiment, SECTIONS) == 0
    assert f"run: {experiment.run}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ar_s", "ar_m", "ar_l", "calm_m", "calm_l", "calm_xl"])
def test_models_of_the_paper_have_its_settings(name: str) -> None:
    experiment = load(name)
    training = experiment.training
    assert training.steps == 250_000
    assert training.global_batch * training.positions * experiment.data.k == 2**21
    assert (training.schedule.kind, training.schedule.warmup) == ("constant", 2000)
    assert asdict(training.optimizer) == {
        "learning_rate": 3e-4,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "clip": 1.0,
    }
    assert experiment.data.vocabulary == 128_257
    assert experiment.head.kind == ("softmax" if name.startswith("ar") else "energy")


def test_the_autoencoder_of_the_paper_and_what_is_made_with_it() -> None:
    experiment = load("autoencoder")
    training = experiment.autoencoder_training
    assert training.steps == 30_000
    assert training.global_batch * training.positions * experiment.data.k == 2**19
    for name in ("calm_m", "calm_l", "calm_xl"):
        calm = load(name)
        assert calm.paths.autoencoder == experiment.paths.autoencoder
        assert calm.paths.chunks == experiment.paths.chunks
        assert calm.autoencoder == experiment.autoencoder


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_not_of_the_paper_says_so(path: Path) -> None:
    if path.stem == "demo":
        return
    for key in ("world", "micro_batch", "eval_every", "save_every"):
        lines = [line for line in path.read_text().splitlines() if line.strip().startswith(f"{key}:")]
        assert lines
        assert all(OURS in line for line in lines)
