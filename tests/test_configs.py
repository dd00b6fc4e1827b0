"""The configurations that are shipped."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
from launching import ROOT

from calm_core import config
from calm_core.config.experiment import Experiment
from calm_core.errors import UserError
from calm_core.io import MANIFEST, format_version, write_json
from calm_core.plan.dry_run import model_shape, plan_autoencoder, plan_calm, vocabulary
from calm_core.plan.flops import executed_training

FILES = sorted((ROOT / "configs").glob("*.yaml"))
OURS = "Choices of ours, where the paper says nothing"


def load(name: str) -> Experiment:
    return config.load(Experiment, ROOT / "configs" / f"{name}.yaml", [])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_can_be_planned(path: Path, capsys: pytest.CaptureFixture) -> None:
    experiment = config.load(Experiment, path, [])
    plan = plan_autoencoder if path.stem.startswith("autoencoder") else plan_calm
    assert plan(experiment, ("data", "plan"), lambda *_: []) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"run: {experiment.run}\nseed: 0\ndata:\n")
    assert "TOO MUCH" not in text


def test_the_plan_of_the_largest_model(capsys: pytest.CaptureFixture) -> None:
    experiment = config.load(Experiment, ROOT / "configs" / "calm_xl.yaml", ["plan.world=512", "plan.price=2"])
    plan_calm(experiment, ("plan",), lambda *_: [])
    text = capsys.readouterr().out
    for line in (
        "model: 1829.8M parameters without the autoencoder, vocabulary 128257",
        "ranks: 512 = tensor 2 x pipeline 1 x data 256; each rank is in one of 2 dp, 256 tp, 512 pp groups (checked)",
        "batch: 256 samples a step = 256 data-parallel ranks x 1 a micro-batch x 1 accumulated",
        "work: 2,097,152 tokens a step, 250,000 steps, 524.3B tokens",
        "a checkpoint is 22 GB",
        "disk: 230B tokens of text: tokens 920 GB",
        "chunks with latents 30.4 TB",
    ):
        assert line in text
    seconds = float(re.search(r"time of a step: (\d+) ms", text)[1]) / 1e3
    hours, money = (
        float(re.search(pattern, text)[1].replace(",", "")) for pattern in (r"cost: (\S+) ", r", (\S+) at 2 ")
    )
    assert hours == pytest.approx(512 * 250_000 * seconds / 3600, rel=0.1)  # evaluations and checkpoints take little
    assert money == pytest.approx(2 * hours, abs=2)
    fastest = text.partition("the fastest layouts that fit")[2].splitlines()[2].split()
    assert fastest[:3] == ["this", "2", "1"]


def test_a_plan_needs_to_know_the_vocabulary(tmp_path: Path) -> None:
    experiment = config.load(Experiment, None, [f"run={tmp_path}", "data.tokenizer=some.model"])
    with pytest.raises(UserError, match=r"data\.vocabulary is not set, and the plan needs to know that of some\.model"):
        plan_calm(experiment, ("plan",), lambda *_: [])
    assert vocabulary(config.load(Experiment, None, [f"run={tmp_path}", "tokenizer.vocab_size=999"])) == 999
    (tmp_path / "tokens").mkdir()
    manifest = {"kind": "tokens", "format_version": format_version("tokens"), "vocab_size": 77}
    write_json(tmp_path / "tokens" / MANIFEST, manifest)
    assert vocabulary(experiment) == 77


def test_the_model_with_a_token_loss_is_the_papers_but_for_it() -> None:
    ours, paper = load("calm_m_token_loss"), load("calm_m")
    changed = config.differences(asdict(paper), asdict(ours))
    assert {key for key, *_ in changed if not key.startswith("training.token_loss.")} == {"run"}
    assert all(load(name).token_loss is None for name in ("calm_m", "calm_l", "calm_xl"))
    with_it, without = (executed_training(model_shape(each), each.training.positions) for each in (ours, paper))
    assert 1.0 < with_it / without <= 1.08


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


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "demo"], ids=lambda path: path.stem)
def test_the_header_names_what_is_not_of_the_paper(path: Path) -> None:
    header = " ".join(line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# "))
    ours = re.search(rf"{OURS}: ([a-z_., ]+)\.( |$)", header)[1].split(", ")
    given = dict(config.flatten(config.read_yaml(path)))
    assert set(ours) <= given.keys()
    assert {
        key for key in given if key.rpartition(".")[2] in ("world", "micro_batch", "eval_every", "save_every")
    } <= set(ours)
