"""Training with a token side loss: its own term in the metrics, resume, and a model that is used without it."""

from pathlib import Path

import pytest

from calm_core import config
from calm_core.checkpoint.folder import open_checkpoint
from calm_core.checkpoint.tensor_folder import read_weights
from calm_core.config.experiment import Experiment
from calm_core.config.training_config import ParallelConfig
from calm_core.distributed.topology import distributed
from calm_core.errors import ExitCode, UserError
from calm_core.inference.load_model import load_for_inference
from calm_core.reference.convert import export_reference
from calm_core.training.launch import run_calm
from calm_core.training.run_log import read_metrics

SIDE = ("training.token_loss.weight=2", "training.token_loss.rank=8", "training.token_loss.until=0.5")


def train(folder: Path, *overrides: str) -> ExitCode:
    return run_calm(config.load(Experiment, folder / "config.yaml", [f"run={folder}", *overrides]))


def steps(folder: Path) -> list[dict[str, float]]:
    return read_metrics(folder / "calm" / "metrics.jsonl", "train")


def test_a_run_with_it_resumes_and_is_used_without_it(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny, *SIDE, "training.save_every=3") == ExitCode.OK
    first, *_, last = steps(tiny)
    assert first["token_loss"] == pytest.approx(5.7, abs=0.3)  # log 300
    assert steps(tiny)[2]["token_loss"] < first["token_loss"]
    assert "token_loss" not in last  # it ended after half of the steps
    whole = [record["loss"] for record in steps(tiny)]
    (tiny / "calm" / "checkpoints" / "step-6" / "manifest.json").unlink()
    assert train(tiny, *SIDE, "training.save_every=3") == ExitCode.OK
    assert [record["loss"] for record in steps(tiny)] == whole

    checkpoint = open_checkpoint(tiny / "calm" / "checkpoints" / "step-6")
    assert any(name.startswith("token_loss.") for name in read_weights(checkpoint))
    with distributed(ParallelConfig()) as topology:
        loaded = load_for_inference(tiny, topology.device)
        export_reference(tiny, tmp_path / "exported")
    assert not any("token_loss" in name for name, _ in loaded.model.named_parameters())
    with pytest.raises(UserError, match=r"token_loss"):
        train(tiny, "training.steps=7")
    capsys.readouterr()
    for number, side in enumerate([[], SIDE, ["training.token_loss.weight=1"]]):
        start = f"training.init_from={checkpoint.path}"
        chunks = [f"data.{name}={tiny / name}" for name in ("chunks", "tokens")]
        paths = [f"data.autoencoder={tiny / 'autoencoder' / 'frozen'}", f"run={tiny / str(number)}", *chunks]
        assert train(tiny, *paths, start, *side, "training.steps=1", "training.token_loss.until=1") == ExitCode.OK
        which = "all weights" if side is SIDE else "compression.* backbone.* head.* alone"
        assert f"starting from {which} of" in capsys.readouterr().out


def test_it_may_end_between_two_lines_of_metrics(tiny: Path) -> None:
    assert train(tiny, *SIDE, "training.log_every=2") == ExitCode.OK
    assert ["token_loss" in line for line in steps(tiny)] == [True, True, False]  # of steps 1-2, 3-4, 5-6; ends after 3


def test_the_autoencoder_has_none(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"autoencoder_training.token_loss.weight has no effect"):
        config.load(Experiment, tiny / "config.yaml", ["autoencoder_training.token_loss.weight=1"])
