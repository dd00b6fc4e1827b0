import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from calm_core import config as configuration
from calm_core.autoencoder.artefact import save_autoencoder
from calm_core.autoencoder.model import Autoencoder
from calm_core.checkpoint import load as checkpoint
from calm_core.checkpoint.weights import write_weights
from calm_core.config.data_config import TokenizerConfig
from calm_core.config.experiment import Experiment
from calm_core.config.generation_config import GenerationOptions
from calm_core.config.model_config import HeadConfig, ModelShape
from calm_core.config.parallel_config import ParallelConfig
from calm_core.config.training_config import OptimizerConfig
from calm_core.distributed.engine import Engine
from calm_core.distributed.topology import Topology
from calm_core.errors import UserError
from calm_core.inference.generate import generate
from calm_core.inference.load_model import Loaded, load_for_inference
from calm_core.io import write_json
from calm_core.manifest import format_version, source_hash, store_hash
from calm_core.model.backbone import transformer_config
from calm_core.model.cache import KeyValueCache
from calm_core.model.calm import CalmModel
from calm_core.model.noise import SampleNoise
from calm_core.model.parameters import initialize, named_parameters, pieces
from calm_core.tokenizer import train_tokenizer

SCRIPT = Path(__file__).parents[2] / "pretrain" / "generate.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(topology: Topology, loaded: Loaded, spoken_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of the model, its autoencoder and its tokenizer."""
    run = tmp_path_factory.mktemp("run")
    experiment = Experiment(run="where/it/was")
    (run / "tokenizer").mkdir()
    shutil.copy(spoken_path, run / "tokenizer" / "tokenizer.model")
    tokenizer_hash = loaded.tokenizer.content_hash
    frozen_hash = save_autoencoder(loaded.autoencoder, run / "autoencoder" / "frozen", tokenizer_hash, {})
    made_from = {"tokenizer": tokenizer_hash, "autoencoder": frozen_hash}
    (run / "chunks").mkdir()
    write_json(
        run / "chunks" / "manifest.json",
        {"kind": "chunks", "format_version": format_version("chunks"), "made_from": made_from},
    )
    identity = {"model": asdict(loaded.shape), "data": source_hash(made_from), "positions": 40}
    state = {"config": configuration.to_dict(experiment), "identity": identity, "updates": 0}
    (run / "calm" / "checkpoints").mkdir(parents=True)
    engine = Engine([loaded.model], OptimizerConfig(), topology)
    for step in (2, 10):
        checkpoint.save(run / "calm" / "checkpoints", step, engine, state, keep=2)
    return run


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


def test_a_loaded_checkpoint_speaks_as_the_model_it_holds(run: Path, loaded: Loaded) -> None:
    options = GenerationOptions(max_tokens=20, temperature=1 / 2, samples=20)
    wanted = generate(loaded, ["the fox"], options)
    newest = run / "calm" / "checkpoints" / "step-10"
    for path in (run, run / "calm", newest):
        found = load_for_inference(path, CPU)
        assert (found.shape, found.positions) == (loaded.shape, 40)
        assert generate(found, ["the fox"], options) == wanted


def test_the_direct_way_changes_nothing(run: Path, loaded: Loaded) -> None:
    tokens = torch.arange(2 * 7 * 3).view(2, 7, 3)
    noise = SampleNoise(0, [0, 1], CPU)
    with torch.no_grad():
        spoken = load_for_inference(run, CPU).model
        hidden = loaded.model.hidden(tokens)
        torch.testing.assert_close(spoken.hidden(tokens), hidden)
        cache = KeyValueCache()
        parts = [spoken.hidden(part, cache) for part in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:])]
        torch.testing.assert_close(torch.cat(parts), hidden)
        torch.testing.assert_close(spoken.head.sample(hidden, noise, 5), loaded.model.head.sample(hidden, noise, 5))


def test_bf16_on_request(run: Path) -> None:
    found = load_for_inference(run, CPU, torch.bfloat16)
    assert {weight.dtype for weight in found.model.parameters()} == {torch.bfloat16}
    assert found.autoencoder.dtype == torch.bfloat16
    [completion] = generate(found, ["the fox"], GenerationOptions(max_tokens=20, seed=1))
    assert completion.chunks


def test_what_is_missing_or_does_not_belong_is_named(copied: Path, loaded: Loaded) -> None:
    frozen, tokenizer = copied / "autoencoder" / "frozen", copied / "tokenizer" / "tokenizer.model"
    with pytest.raises(UserError, match="no complete checkpoint"):
        load_for_inference(copied / "autoencoder", CPU)
    save_autoencoder(loaded.autoencoder, frozen, "another tokenizer", {})
    with pytest.raises(UserError, match=str(tokenizer)):
        load_for_inference(copied, CPU)
    shutil.rmtree(frozen)
    with pytest.raises(UserError, match=str(frozen)):
        load_for_inference(copied, CPU)
    tokenizer.unlink()
    with pytest.raises(UserError, match=str(tokenizer)):
        load_for_inference(copied, CPU)


def test_another_autoencoder_than_that_of_the_data_is_refused(copied: Path, loaded: Loaded) -> None:
    other = Autoencoder(loaded.autoencoder.config, loaded.shape.vocabulary, loaded.shape.k)
    save_autoencoder(other, copied / "autoencoder" / "frozen", loaded.tokenizer.content_hash, {})
    with pytest.raises(UserError, match="not the autoencoder"):
        load_for_inference(copied, CPU)
    shutil.rmtree(copied / "chunks")  # nothing left to compare with
    assert load_for_inference(copied, CPU)


@pytest.fixture
def baseline(topology: Topology, loaded: Loaded, spoken_path: Path, tmp_path: Path) -> Path:
    """A run folder with a checkpoint of an autoregressive model, its tokenizer and its token store."""
    shape = ModelShape(loaded.shape.backbone, HeadConfig(kind="softmax"), loaded.shape.vocabulary, k=1, latent=0)
    model = CalmModel(transformer_config(shape.backbone, ParallelConfig()), shape)
    initialize([model], 0.3, seed=0)
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(spoken_path, tmp_path / "tokenizer" / "tokenizer.model")
    (tmp_path / "tokens").mkdir()
    made_from = {"tokenizer": loaded.tokenizer.content_hash}
    write_json(tmp_path / "tokens" / "manifest.json", {"kind": "tokens", "format_version": 1, "made_from": made_from})
    identity = {"model": asdict(shape), "data": store_hash(tmp_path / "tokens"), "positions": 40}
    state = {"config": configuration.to_dict(Experiment()), "identity": identity}
    parts = [(piece, p.data) for name, p in named_parameters([model]) for piece in pieces(name, p)]
    weights = {piece.name: piece.of(local) for piece, local in parts}
    write_weights(tmp_path / "calm" / "checkpoints" / "step-1", weights, state)
    return tmp_path


def test_the_baseline_speaks_with_its_own_tokenizer_alone(baseline: Path) -> None:
    found = load_for_inference(baseline, CPU)
    assert found.autoencoder is None
    [completion] = generate(found, ["the fox"], GenerationOptions(max_tokens=5, temperature=1 / 2, samples=20))
    assert len(completion.tokens) == 5 or completion.reason == "eos"
    own = baseline / "tokenizer" / "tokenizer.model"
    train_tokenizer(["another text of the same vocabulary size"] * 20, TokenizerConfig(vocab_size=300), own, {})
    with pytest.raises(UserError, match="not the tokenizer"):
        load_for_inference(baseline, CPU)
    shutil.rmtree(baseline / "tokens")  # nothing left to compare with but the number of tokens
    assert load_for_inference(baseline, CPU)


def speak(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


def test_the_script(run: Path) -> None:
    said = speak(run, "--prompt", "the fox", "--max-tokens", 9, "--temperature", "1/2", "--samples", 20)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("the fox")
    assert "tokens/s" in said.stderr
    assert "effective sample size" in said.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--temperature", "1.5", "--method", "batch"], "above 1"),
        (["--temperature", "2/5", "--method", "batch"], "1/n"),
        (["--temperature", "hot"], "temperature"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["--prompt", "a", "--prompt", "b", "--stream"], "--stream"),
        ([], "no complete checkpoint"),
    ],
)
def test_bad_arguments_end_in_a_sentence(tmp_path: Path, arguments: list[str], word: str) -> None:
    said = speak(tmp_path, *arguments)
    assert said.returncode == 2
    assert word in said.stderr
    assert "Traceback" not in said.stderr
