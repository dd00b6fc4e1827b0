import json
import runpy
import shutil
from pathlib import Path

import pytest

from calm_core import config
from calm_core.autoencoder.artefact import load_autoencoder
from calm_core.config.experiment import Experiment
from calm_core.data.store import TokenStore
from calm_core.errors import UserError
from calm_core.evaluation.autoencoder_health import (
    examine_autoencoder,
    experiment_of_autoencoder,
    find_autoencoder,
    spread_chunks,
)

SCRIPT = Path(__file__).parents[2] / "pretrain" / "evaluate.py"


@pytest.fixture
def run(tiny: Path) -> Path:
    """The run folder of a (random) autoencoder, moved from where its configuration says it is."""
    config.save(config.load(Experiment, tiny / "config.yaml", ["run=elsewhere"]), tiny / "autoencoder" / "config.yaml")
    return tiny / "autoencoder"


def test_examination_agrees_with_itself(run):
    model, store = load_autoencoder(run / "frozen"), TokenStore(run.parent / "tokens", "held_out")
    found = examine_autoencoder(model, store, 500, seed=0)
    sigmas, accuracies = zip(*found["noise_curve"], strict=True)
    assert (sigmas[0], sigmas[-1]) == (0.0, 1.0)
    assert accuracies[0] == pytest.approx(found["token_accuracy"])
    assert sum(found["dimension_sigma"]) / 8 == pytest.approx(found["mean_sigma"])
    assert len(found["position_accuracy"]) == 4
    assert found["chunks"] == 500


def test_chunks_are_spread_over_the_split(run):
    model, store = load_autoencoder(run / "frozen"), TokenStore(run.parent / "tokens", "held_out")
    whole = spread_chunks(model, store, len(store))
    some = spread_chunks(model, store, 3)
    assert len(whole) == len(store) // 4
    assert some.tolist() == [whole[i].tolist() for i in (0, (len(whole) - 1) // 2, -1)]


def test_an_autoencoder_is_found_in_its_run_and_nowhere_else(run):
    assert find_autoencoder(run) == find_autoencoder(run / "frozen") == run / "frozen"
    assert find_autoencoder(run.parent) is None
    assert experiment_of_autoencoder(run / "frozen").paths.tokens == run.parent / "tokens"
    lonely = shutil.copytree(run / "frozen", run.parent.parent / "lonely" / "frozen")
    with pytest.raises(UserError, match="does not lie in the run"):
        experiment_of_autoencoder(lonely)


@pytest.mark.parametrize("source", ["held_out", "text", "tokens"])
def test_the_script_leaves_numbers_and_a_picture(run, source, capsys):
    text = run.parent / "corpus" / "0.txt"
    arguments = {"held_out": [], "text": ["--text", str(text)], "tokens": ["--tokens", str(run.parent / "tokens")]}
    output = run / "health.json"
    runpy.run_path(str(SCRIPT))["main"]([str(run), "--chunks", "200", "--output", str(output), *arguments[source]])
    result = json.loads(output.read_text())
    shown = capsys.readouterr().out
    assert f"{result['token_accuracy']:.3%}" in shown
    assert f"of {len(result['kl'])}" in shown
    assert output.with_suffix(".png").stat().st_size > 1000
