import json
import math
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from launching import ROOT

import calm_core as calm
from calm_core.config.model_config import BackboneConfig, HeadConfig, ModelShape
from calm_core.errors import UserError
from calm_core.inference.load_model import Loaded
from calm_core.model.calm import CalmModel
from calm_core.model.parameters import initialize
from calm_core.model.single_rank import SingleRank


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notebook") / "runs" / "demo"
    return Path(shutil.copytree(ROOT / "tests" / "fixtures" / "old_run", folder))


@pytest.fixture(scope="module")
def model(run: Path) -> calm.LanguageModel:
    return calm.load(str(run))


@pytest.fixture(scope="module")
def baseline(model: calm.LanguageModel) -> calm.LanguageModel:
    """A random autoregressive model with the same tokenizer."""
    tokenizer = model.loaded.tokenizer
    backbone = BackboneConfig(hidden=16, ffn=32, layers=1, heads=2)
    network = CalmModel(
        SingleRank.of(backbone), ModelShape(backbone, HeadConfig("softmax"), tokenizer.vocab_size, 1, 0)
    )
    initialize([network], 0.3, seed=0)
    return calm.LanguageModel(Loaded(network.eval(), None, tokenizer, positions=9))


def test_importing_the_package_is_cheap() -> None:
    program = (
        "import sys, calm_core; assert not {'torch', 'yaml', 'numpy'} & set(sys.modules); print(calm_core.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_a_misspelled_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="laod"):
        calm.laod  # noqa: B018


def test_the_notebook_runs(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(run.parents[1])
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"cell {number}", "exec"), names)
    told = capsys.readouterr().out
    assert calm.__version__ in told
    assert "LanguageModel(head=energy, k=4" in told
    assert "\nThe" in told
    assert set(names["score"]) == {"brier_1", "brier_2", "brier_3", "brier_4", "collision_1", "positions"}


def test_a_text_for_a_text_and_a_list_for_a_list(model: calm.LanguageModel) -> None:
    one = model.generate("The", temperature=0.5, max_tokens=12)
    assert one.startswith("The")
    assert model.generate(["The", ""], temperature=0.5, max_tokens=12)[0] == one
    [completion] = model.complete(["The"], max_tokens=12, stop="e")
    assert "e" not in completion.text
    with pytest.raises(UserError, match="heat is not a generation option"):
        model.generate("The", heat=2)
    with pytest.raises(UserError, match="top_k=5 needs logits"):
        model.generate("The", top_k=5)


def test_a_score_is_that_of_all_whole_chunks(model: calm.LanguageModel) -> None:
    text = "The people of the United States have much to be thankful for. " * 4
    score = model.score(text)
    tokens = len(model.loaded.tokenizer.encode(text)) + 1
    windows = math.ceil(tokens // 4 / model.loaded.positions)
    assert score["positions"] == tokens // 4 - windows
    assert all(-1 <= score[f"brier_{n}"] <= 1 for n in range(1, 5))
    assert score["brier_1"] >= score["brier_4"] - 0.05
    assert score == model.score(text)
    with pytest.raises(UserError, match="two chunks"):
        model.score("")


def test_the_score_of_a_baseline_has_its_likelihood(baseline: calm.LanguageModel) -> None:
    tokenizer, network = baseline.loaded.tokenizer, baseline.loaded.model
    text = "The people of the"
    score = baseline.score(text, samples=4000)
    tokens = torch.tensor([tokenizer.bos, *tokenizer.encode(text)])
    window = tokens[:9].view(1, -1, 1)
    with torch.no_grad():
        logs = network.head.logits(network.hidden(window)[:-1])[:, 0].log_softmax(-1)
    truth = logs.gather(1, tokens[1:9, None])
    assert len(tokens) <= 10  # one window, and at most a chunk that has nothing before it
    assert score["positions"] == len(truth)
    assert score["log_likelihood"] == pytest.approx(truth.mean().item(), rel=1e-4)
    exact = (2 * truth.exp().squeeze(1) - logs.exp().square().sum(-1)).mean().item()
    assert score["brier_1"] == pytest.approx(exact, abs=0.01)


def test_latents_of_a_text_decode_to_it(model: calm.LanguageModel, baseline: calm.LanguageModel) -> None:
    text = "The people of the United States"
    latents, k = model.encode(text), model.loaded.shape.k
    assert latents.shape == (math.ceil(len(model.loaded.tokenizer.encode(text)) / k), model.loaded.shape.latent)
    tokens = model.loaded.autoencoder.decode_tokens(latents).flatten().tolist()
    assert model.decode(latents) == model.loaded.tokenizer.decode(tokens)
    assert model.decode(model.encode("")) == ""
    for refused in (lambda: baseline.encode(text), lambda: baseline.decode(latents)):
        with pytest.raises(UserError, match="no latents"):
            refused()
