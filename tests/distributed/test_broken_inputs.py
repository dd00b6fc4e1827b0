"""Commands given inputs that are damaged or do not belong together: a sentence names the file, exit code 2."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import cut, flip
from launching import ROOT, finish, launch, run_script, torchrun

from calm_core import config
from calm_core.autoencoder.model import Autoencoder, load_autoencoder, save_autoencoder
from calm_core.checkpoint.folder import damaged_files, list_checkpoints, open_checkpoint
from calm_core.config.data_config import TokenizerConfig
from calm_core.config.experiment import Experiment
from calm_core.config.model_config import AutoencoderConfig
from calm_core.data.tokens import build_tokens
from calm_core.errors import ExitCode
from calm_core.io import read_json
from calm_core.tokenizer import load_tokenizer
from calm_core.tokenizer.sentencepiece import train_tokenizer
from calm_core.training.launch import run_calm

pytestmark = pytest.mark.slow

TRAIN, BUILD = ROOT / "pretrain" / "train_calm.py", ROOT / "data_prep" / "build_chunks.py"


def refusal(ended: tuple[int, str]) -> str:
    """The one sentence with which a command has refused."""
    code, output = ended
    assert code == ExitCode.USAGE, output
    assert "Traceback" not in output
    return output


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_shard_of_chunks(tiny: Path, damage: Callable[[Path], None]) -> None:
    shard = read_json(tiny / "chunks" / "manifest.json")["splits"]["train"]["shards"][0]["file"]
    damage(tiny / "chunks" / shard)
    output = refusal(run_script(TRAIN, tiny / "config.yaml", f"run={tiny}"))
    assert str(tiny / "chunks" / shard) in output
    assert not (tiny / "calm").exists()


def test_another_autoencoder(tiny: Path) -> None:
    old = load_autoencoder(tiny / "autoencoder" / "frozen")
    torch.manual_seed(1)
    other = Autoencoder(AutoencoderConfig(hidden=16, latent=8), old.vocab_size, k=4)
    save_autoencoder(other, tiny / "autoencoder" / "frozen", old.tokenizer_hash, {})
    output = refusal(run_script(TRAIN, tiny / "config.yaml", f"run={tiny}"))
    assert f"latents in {tiny / 'chunks'} were made by the autoencoder {old.content_hash}" in output
    assert not (tiny / "calm").exists()


def test_tokens_of_another_tokenizer(tiny: Path) -> None:
    experiment = config.load(Experiment, tiny / "config.yaml", [f"run={tiny}"])
    train_tokenizer(["another corpus of other words"] * 50, TokenizerConfig(vocab_size=280), tiny / "t.model", {})
    build_tokens(experiment.data, load_tokenizer(tiny / "t.model"), tiny / "others")
    stores = [f"data.tokens={tiny / 'others'}", f"data.chunks={tiny / 'new'}"]
    output = refusal(run_script(BUILD, tiny / "config.yaml", f"run={tiny}", *stores))
    assert "tokenizer" in output
    assert str(tiny / "others") in output
    assert not (tiny / "new" / "manifest.json").exists()


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_finished_run_whose_last_tensors_are_damaged(
    tiny: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def train() -> str:
        changes = [f"run={tiny}", "training.steps=2", "training.save_every=1", "training.background_saves=false"]
        assert run_calm(config.load(Experiment, tiny / "config.yaml", changes)) == ExitCode.OK
        return capsys.readouterr().out

    train()
    checkpoints = tiny / "calm" / "checkpoints"
    damage(checkpoints / "step-2" / "tensors" / "rank-0.safetensors")
    assert f"resumed from {checkpoints / 'step-1'}" in train()
    assert damaged_files(open_checkpoint(checkpoints / "step-2"), slice(None)) == []
    assert "finished: " in train()


def test_a_full_disk_on_two_ranks(tiny: Path) -> None:
    """A limit on the size of a file stands for the disk: neither rank can write its share of the second checkpoint."""
    arguments = [str(tiny / "config.yaml"), f"run={tiny}"]
    launch(2, TRAIN, *arguments, "training.steps=2")
    # The shell counts in blocks of 512 or 1024 bytes; a share takes some hundred thousand.
    limited = ["bash", "-c", 'ulimit -f 64; exec "$@"', "limited"]
    command = [*limited, *torchrun(2, TRAIN, *arguments, "training.steps=6", "training.save_every=3")]
    output = refusal(finish(command, seconds=200))
    assert "step-3 could not be written" in output
    assert "earlier checkpoints are intact" in output
    [left] = list_checkpoints(tiny / "calm" / "checkpoints")
    assert left.name == "step-2"
    assert damaged_files(open_checkpoint(left), slice(None)) == []
    assert f"resumed from {left}" in launch(2, TRAIN, *arguments, "training.steps=6")
