"""What a run reads, through the path of the real command: a blend of stores, latents encoded on the way."""

import sys
from pathlib import Path

import pytest

from calm_core import config
from calm_core.errors import ExitCode, UserError
from calm_core.experiment import Experiment
from calm_core.training.launch import run_autoencoder, run_calm
from calm_core.training.run_log import read_metrics

sys.path.insert(0, str(Path(__file__).parents[2] / "pretrain"))
import inspect_batch


def test_a_blend_trains_resumes_and_shows_its_documents(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second store is the first one again: each of its windows comes once more often."""

    def run(*changes: str, weight: float = 0.25, epochs: int = 0) -> ExitCode:
        store = f"chunks: {tiny}/chunks, tokens: {tiny}/tokens"
        blend = f"[{{{store}}}, {{{store}, weight: {weight}, epochs: {epochs}}}]"
        return run_of(config.load(Experiment, tiny / "config.yaml", [f"run={tiny}", f"data.blend={blend}", *changes]))

    run_of = run_autoencoder
    assert run("autoencoder_training.steps=1", f"run={tiny}/other") == ExitCode.OK
    run_of = run_calm
    assert run("training.steps=1") == ExitCode.OK
    with pytest.raises(UserError, match=r"data was .*0\.25.* and is now .*0\.5"):
        run(weight=0.5)
    assert run("training.steps=2") == ExitCode.OK
    assert [record["step"] for record in read_metrics(tiny / "calm" / "metrics.jsonl", "train")] == [1, 2]
    capsys.readouterr()
    inspect_batch.inspect([str(tiny / "calm"), "--step", "2"])
    assert capsys.readouterr().out.count(".txt") >= 8
    once = f"data.blend=[{{chunks: {tiny}/chunks, epochs: 1}}]"
    with pytest.raises(UserError, match=r"data\.blend give [\d,]+ samples"):
        run(once, "training.steps=9999", f"run={tiny}/new", f"data.autoencoder={tiny}/autoencoder/frozen")


def test_latents_that_are_encoded_on_the_way_are_those_of_the_store(tiny: Path) -> None:
    """Up to float16's rounding of the stored ones; and a run may go on with the other kind."""

    def run(run: str, *changes: str) -> list[float]:
        places = [f"data.{name}={tiny}/{name}" for name in ("tokens", "chunks")]
        made = [*places, f"data.autoencoder={tiny}/autoencoder/frozen", f"run={tiny}/{run}"]
        assert run_calm(config.load(Experiment, tiny / "config.yaml", [*made, *changes])) == ExitCode.OK
        return [record["loss"] for record in read_metrics(tiny / run / "calm" / "metrics.jsonl", "train")]

    stored = run("stored", "training.steps=2", "training.eval_every=2")
    begun = run("mixed", "training.steps=1")
    (tiny / "chunks").rename(tiny / "no chunks")
    encoded = run("encoded", "training.steps=2", "training.eval_every=2", "data.latents=encode")
    assert encoded == pytest.approx(stored, rel=1e-5)
    assert [*begun, *run("mixed", "training.steps=2", "data.latents=encode")[1:]] == pytest.approx(stored, rel=1e-5)
    scores = [read_metrics(tiny / run / "calm" / "metrics.jsonl", "eval")[0] for run in ("stored", "encoded")]
    for name in ("loss", "brier_1", "unigram_brier_1", "documents"):
        assert scores[0][name] == pytest.approx(scores[1][name], rel=1e-3)
