"""The preparation scripts, one after the other, as a user runs them."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from calm_core.autoencoder.model import Autoencoder, save_autoencoder
from calm_core.config import command
from calm_core.config.experiment import Experiment
from calm_core.config.model_config import AutoencoderConfig
from calm_core.data.store import ChunkStore, TokenStore
from calm_core.tokenizer import load_tokenizer

SCRIPTS = Path(__file__).parents[1] / "data_prep"


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """A configuration with a corpus of forty documents."""
    lines = [json.dumps({"text": f"Document {n} says: {'so it goes, ' * (n % 7 + 1)}the end."}) for n in range(40)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    config = {
        "run": str(tmp_path / "run"),
        "data": {"corpus": [f"{tmp_path}/*.jsonl"], "held_out": 0.2, "k": 2},
        "tokenizer": {"vocab_size": 300},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    return tmp_path / "config.yaml"


def run(name: str, *arguments: object) -> int:
    script = runpy.run_path(str(SCRIPTS / f"{name}.py"))
    argv = [str(argument) for argument in arguments]
    return command.run(
        script["__doc__"], Experiment, script["SECTIONS"], script["prepare"], argv, options=script.get("OPTIONS")
    )


def freeze_autoencoder(run_folder: Path, k: int) -> None:
    tokenizer = load_tokenizer(run_folder / "tokenizer" / "tokenizer.model")
    model = Autoencoder(AutoencoderConfig(hidden=8, latent=4), tokenizer.vocab_size, k)
    save_autoencoder(model, run_folder / "autoencoder" / "frozen", tokenizer.content_hash, {})


def test_from_text_to_chunks(experiment, capsys):
    folder = experiment.parent / "run"
    for name in ("train_tokenizer", "tokenize_corpus", "build_chunks"):
        if name == "build_chunks":
            torch.manual_seed(0)
            freeze_autoencoder(folder, k=2)
        before = set(folder.rglob("*"))
        assert run(name, experiment, "--dry-run") == 0
        assert "would" in capsys.readouterr().out
        assert set(folder.rglob("*")) == before
        for _ in range(2):
            assert run(name, experiment) == 0
            assert "finished: " in capsys.readouterr().out
    assert TokenStore(folder / "tokens", "train").document_count > 20
    assert ChunkStore(folder / "chunks", "held_out").k == 2


@pytest.mark.parametrize(("name", "made"), [("train_tokenizer", "run/tokenizer"), ("tokenize_corpus", "run/tokens")])
def test_a_dry_run_before_anything_is_made_checks_the_corpus(name, made, experiment, capsys):
    assert run(name, experiment, "--dry-run") == 0
    assert "would" in (said := capsys.readouterr().out)
    assert "1 files" in said
    assert str(experiment.parent / made) in said
    for corpus, advice in ((experiment.parent, "name the files in it"), ("absent.txt", "there is no such file")):
        assert run(name, experiment, "--dry-run", f"data.corpus={corpus}") == 2
        assert advice in capsys.readouterr().err


def test_shares_and_a_finish_make_the_stores(experiment, capsys):
    small, folder = "data.shard_bytes=500", experiment.parent / "run"
    run("train_tokenizer", experiment)
    for name, store in (("tokenize_corpus", "tokens"), ("build_chunks", "chunks")):
        if name == "build_chunks":
            freeze_autoencoder(folder, k=2)
        assert run(name, experiment, small, f"data.{store}={folder}/whole_{store}") == 0
        assert run(name, experiment, small, "--shard", "1/2") == 0
        assert "finished task 1 of 2" in capsys.readouterr().out
        if name == "build_chunks":
            assert run(name, experiment, small, "--finish") == 2
            assert "are not done: 0 (" in capsys.readouterr().err
        assert run(name, experiment, small, "--shard", "0/2") == 0
        assert run(name, experiment, small, "--shard", "0/2", "--finish") == 2
        assert "two steps" in capsys.readouterr().err
        assert run(name, experiment, small, "--finish") == 0
        assert f"finished: {folder / store}" in capsys.readouterr().out
        left, right = (sorted((folder / place).iterdir()) for place in (store, f"whole_{store}"))
        assert [path.name for path in left] == [path.name for path in right]
        assert all(one.read_bytes() == other.read_bytes() for one, other in zip(left, right, strict=True))


def test_chunks_of_another_k_than_the_autoencoder_are_refused(experiment, capsys):
    for name in ("train_tokenizer", "tokenize_corpus"):
        run(name, experiment)
    freeze_autoencoder(experiment.parent / "run", k=3)
    assert run("build_chunks", experiment) == 2
    assert "data.k=2" in capsys.readouterr().err
    assert not (experiment.parent / "run" / "chunks").exists()


@pytest.mark.parametrize(
    ("name", "override", "sentence"),
    [
        ("train_tokenizer", "tokenizer.vocab_size=30000", "tokenizer.vocab_size=30000 is more than"),
        ("train_tokenizer", "data.corpus=[https://example.org/a.jsonl]", "download it first"),
        ("tokenize_corpus", "data.tokenizer=nowhere.model", "nowhere.model"),
        ("build_chunks", "data.autoencoder=nowhere", "nowhere"),
    ],
)
def test_bad_input_is_one_sentence(experiment, capsys, name, override, sentence):
    assert run(name, experiment, override) == 2
    complaint = capsys.readouterr().err
    assert sentence in complaint
    assert len(complaint.splitlines()) == 1
    assert not (experiment.parent / "run").exists()


@pytest.mark.parametrize("name", ["train_tokenizer", "tokenize_corpus"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(experiment, capsys, name):
    if name == "tokenize_corpus":
        run("train_tokenizer", experiment)
    (experiment.parent / "file").touch()
    capsys.readouterr()
    key = "tokenizer" if name == "train_tokenizer" else "tokens"
    assert run(name, experiment, f"data.{key}={experiment.parent}/file/made") == 2
    output = capsys.readouterr()
    assert "file is a file, not a folder" in output.err
    assert "tokenizing" not in output.err


def test_a_corpus_of_one_document_reports_how_it_is_split(experiment, capsys):
    (experiment.parent / "corpus.jsonl").write_text(json.dumps({"text": "So it goes, to the end. " * 300}))
    for name in ("train_tokenizer", "tokenize_corpus"):
        assert run(name, experiment) == 0
    assert "held out: the last 25.0% of every document, with a gap before it" in capsys.readouterr().out


def test_a_user_error_is_printed_on_every_rank_of_a_pod(experiment, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run("tokenize_corpus", experiment, "data.tokenizer=nowhere.model") == 2
    assert "nowhere.model" in capsys.readouterr().err
