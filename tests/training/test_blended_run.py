"""A run on a blend of stores, through the path of the real command."""

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
