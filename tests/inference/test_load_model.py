import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from calm_core import config as configuration
from calm_core.autoencoder.model import Autoencoder, save_autoencoder
from calm_core.checkpoint import load as checkpoint
from calm_core.checkpoint.folder import open_checkpoint
from calm_core.checkpoint.tensor_folder import write_weights
from calm_core.config import command
from calm_core.config.data_config import TokenizerConfig
from calm_core.config.experiment import Experiment
from calm_core.config.generation_config import GenerationOptions
from calm_core.config.model_config import HeadConfig, ModelShape
from calm_core.config.training_config import OptimizerConfig, ParallelConfig
from calm_core.distributed.engine import Engine
from calm_core.distributed.topology import Topology
from calm_core.errors import UserError
from calm_core.inference.generate import generate
from calm_core.inference.load_model import DocumentFormat, Loaded, document_format, load_for_inference
from calm_core.inference.request import read_prompts
from calm_core.io import format_version, source_hash, store_hash, write_json
from calm_core.model.attention import KeyValueCache
from calm_core.model.backbone import transformer_config
from calm_core.model.calm import CalmModel
from calm_core.model.noise import SampleNoise
from calm_core.model.parameters import initialize, named_parameters, pieces
from calm_core.tokenizer.sentencepiece import train_tokenizer

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


def test_a_loaded_checkpoint_generates_as_the_model_it_holds(run: Path, loaded: Loaded) -> None:
    options = GenerationOptions(max_tokens=20, temperature=1 / 2, samples=20)
    wanted = generate(loaded, ["the fox"], options)
    newest = run / "calm" / "checkpoints" / "step-10"
    for path in (run, run / "calm", newest):
        found = load_for_inference(path, CPU)
        assert (found.shape, found.positions) == (loaded.shape, 40)
        assert generate(found, ["the fox"], options) == wanted


def test_plain_layers_compute_what_megatron_core_computes(run: Path, loaded: Loaded) -> None:
    tokens = torch.arange(2 * 7 * 3).view(2, 7, 3)
    noise = SampleNoise(0, [0, 1], CPU)
    with torch.no_grad():
        plain = load_for_inference(run, CPU).model
        hidden = loaded.model.hidden(tokens)
        torch.testing.assert_close(plain.hidden(tokens), hidden)
        cache = KeyValueCache()
        parts = [plain.hidden(part, cache) for part in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:])]
        torch.testing.assert_close(torch.cat(parts), hidden)
        torch.testing.assert_close(plain.head.sample(hidden, noise, 5), loaded.model.head.sample(hidden, noise, 5))


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


def test_the_baseline_loads_with_its_own_tokenizer_alone(baseline: Path) -> None:
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


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script(run: Path) -> None:
    """As a user runs it: nothing but its own lines, and none of the libraries that take seconds to import."""
    arguments = [run, "--prompt", "the fox", "--max-tokens", 9, "--temperature", "1/2", "--samples", 20]
    watched = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "slow = {'megatron', 'deepspeed', 'wandb', 'sympy', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", watched, SCRIPT, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the fox")
    told = done.stderr.splitlines()
    assert [line[0] + line[-1] for line in told] == ["[]"] * 3, done.stderr
    assert "2 draws agree with probability" in told[0]
    assert "effective sample size" in told[1]
    assert "tokens/s" in told[2]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--temperature", "1.5", "--method", "batch"], "above 1"),
        (["--temperature", "2/5", "--method", "batch"], "1/n"),
        (["--temperature", "hot"], "temperature"),
        (["--method", "magic"], "magic"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["--prompt", "a", "--prompt", "b", "--stream"], "--stream"),
        ([], "no complete checkpoint"),
    ],
)
def test_bad_arguments_end_in_a_sentence(
    script: ModuleType, tmp_path: Path, arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.guard(partial(script.main, [str(tmp_path), *arguments])) == 2
    refused = capsys.readouterr()
    assert word in refused.err
    assert "Traceback" not in refused.err
    assert not refused.out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--temperature", "1.5"], "above 1"),
        (["--temperature", "2/5"], "1/n"),
        (["--top-k", "5"], "top_k=5 needs logits"),
        (["--top-p", "0.9"], "top_p=0.9 needs logits"),
        (["--method", "logits"], "softmax"),
        (["--prompt", os.fsdecode(b"caf\xe9")], "prompt 1 is not valid UTF-8"),
    ],
)
def test_what_a_model_cannot_do_ends_in_a_sentence(
    script: ModuleType, run: Path, arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.guard(partial(script.main, [str(run), *arguments])) == 2
    assert word in capsys.readouterr().err


def test_the_baseline_samples_by_its_logits(
    script: ModuleType, baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--temperature", "1.5", "--top-k", "20", "--top-p", "0.9", "--max-tokens", "5", "--stream"]
    assert command.guard(partial(script.main, [str(baseline), "--prompt", "the", *arguments])) == 0
    told = capsys.readouterr()
    assert told.out.startswith("the")
    assert "1 draws per chunk" in told.err


def test_prompts_are_read_as_a_corpus_is(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"one\r\ntwo\rthree\n")
    assert read_prompts(["a"], file) == ["a", "one\r\ntwo\rthree\n"]
    assert read_prompts([], None) == [""]
    file.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="UTF-8"):
        read_prompts([], file)


@pytest.mark.parametrize("changes", [{"eos": False}, {"packing": "align"}, {"eos": False, "packing": "align"}])
def test_the_format_of_the_documents_travels_with_the_run(copied: Path, changes: dict) -> None:
    """From its stores, or, once they are gone, from its configuration."""
    assert load_for_inference(copied, CPU).documents == DocumentFormat()
    wanted = DocumentFormat(**changes)
    checkpoint = open_checkpoint(copied / "calm" / "checkpoints" / "step-10")
    chunks = json.loads((copied / "chunks" / "manifest.json").read_text())
    (copied / "tokens").mkdir()
    tokens = {"kind": "tokens", "format_version": 1, "made_from": {"data.eos": wanted.eos}}
    write_json(copied / "tokens" / "manifest.json", tokens)
    made_from = chunks["made_from"] | {"tokens": store_hash(copied / "tokens")}
    write_json(copied / "chunks" / "manifest.json", chunks | {"made_from": made_from, "packing": wanted.packing})
    identity = checkpoint.state["identity"] | {"data": source_hash(made_from)}
    state = checkpoint.state | {"identity": identity}
    assert document_format(dataclasses.replace(checkpoint, state=state)) == wanted
    shutil.rmtree(copied / "chunks")
    shutil.rmtree(copied / "tokens")
    assert document_format(dataclasses.replace(checkpoint, state=state)) == DocumentFormat()
    state["config"]["data"] |= changes
    assert document_format(dataclasses.replace(checkpoint, state=state)) == wanted
