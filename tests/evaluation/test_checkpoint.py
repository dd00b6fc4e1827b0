"""Checkpoints of every kind, trained for two steps, through the command that compares them."""

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT, launch

from calm_core import config
from calm_core.autoencoder.model import Autoencoder, load_autoencoder, save_autoencoder
from calm_core.checkpoint.folder import finish
from calm_core.config.experiment import EvaluationConfig, Experiment
from calm_core.config.model_config import AutoencoderConfig, ModelShape
from calm_core.config.training_config import ParallelConfig
from calm_core.data.chunks import build_chunks
from calm_core.data.store import ChunkStore
from calm_core.distributed.topology import Topology, distributed
from calm_core.errors import ExitCode, UserError
from calm_core.evaluation.checkpoint import ScoredText, chunks_of_text, evaluate_checkpoint, tokens_of_text
from calm_core.evaluation.tables import checkpoint_table
from calm_core.inference.load_model import DocumentFormat, Loaded, find_checkpoint
from calm_core.model.backbone import transformer_config
from calm_core.model.calm import CalmModel
from calm_core.model.parameters import initialize
from calm_core.tokenizer import load_tokenizer
from calm_core.training import calm_task
from calm_core.training.launch import run_calm
from calm_core.training.run_log import read_metrics


@pytest.fixture(scope="module")
def runs(tiny_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """AR, K=2 and K=4 on the same tokens; the last one is trained on twice the context."""
    folder = tmp_path_factory.mktemp("runs")
    shared = config.load(Experiment, tiny_experiment / "config.yaml", [f"run={tiny_experiment}"]).paths
    tokenizer = load_tokenizer(shared.tokenizer)
    torch.manual_seed(0)
    pairs = Autoencoder(AutoencoderConfig(hidden=16, latent=8, init_std=0.2), tokenizer.vocab_size, k=2)
    save_autoencoder(pairs, folder / "k2" / "autoencoder" / "frozen", tokenizer.content_hash, {})
    build_chunks(shared.tokens, load_autoencoder(folder / "k2" / "autoencoder" / "frozen"), folder / "k2" / "chunks")
    kinds = {
        "ar": ["head.kind=softmax", "training.positions=64"],
        "k2": ["data.k=2", "training.positions=32"],
        "k4": [f"data.chunks={shared.chunks}", f"data.autoencoder={shared.autoencoder}", "training.positions=32"],
    }
    for name, changes in kinds.items():
        changes += [f"run={folder / name}", f"data.tokenizer={shared.tokenizer}", f"data.tokens={shared.tokens}"]
        changes += ["training.steps=2", "evaluation.windows=2"]
        assert run_calm(config.load(Experiment, tiny_experiment / "config.yaml", changes)) == ExitCode.OK
    return {name: folder / name for name in kinds}


def evaluate(*arguments: object) -> None:
    runpy.run_path(str(ROOT / "pretrain" / "evaluate.py"))["main"]([*map(str, arguments), "--samples", "4"])


@pytest.mark.parametrize("source", ["text", "held_out"])
def test_every_kind_is_scored_at_the_same_positions(
    runs: dict[str, Path], tiny_experiment: Path, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.jsonl"
    documents = [path.read_text() for path in sorted(tiny_experiment.glob("corpus/1*.txt"))]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    arguments: list[Any] = ["--text", text] if source == "text" else ["--windows", 9]
    evaluate(*runs.values(), *arguments, "--output", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(result["k"], result["head"], result["rollout_chunks"]) for result in found] == [
        (1, "softmax", 4),
        (2, "energy", 2),
        (4, "energy", 1),
    ]
    ar, *calm = found
    assert ar["measure"] == "brier_lm@ctx64/stride4"
    same = ["context", "measure", "windows", "places_per_window", "scored_positions", "documents", "samples"]
    # The unigram baseline of four tokens tells which tokens they were; its counts see the padding of a last chunk.
    unigram = [f"unigram_brier_{n}" for n in range(1, 5)]
    spreads = {f"spread_{of}{e}" for of in ("samples", "posterior") for e in ("", "_error")}
    for result in calm:
        assert [result[name] for name in same] == [ar[name] for name in same]
        assert [result[name] for name in unigram] == pytest.approx([ar[name] for name in unigram], rel=1e-3)
        assert result.keys() - ar.keys() == spreads
    assert all(ar[f"variance_within_{n}"] > 0 for n in range(1, 5))
    for result in found:
        assert all(-1 <= result[f"brier_{n}"] <= 1 and result[f"brier_{n}_error"] >= 0 for n in range(1, 5))
        assert result["brier_lm"] is not None or result["brier_lm_reason"]
    shown = capsys.readouterr().out
    assert all(str(run) in shown for run in runs.values())
    assert shown.count("\nbigram") == shown.count("\nunigram") == 1


def test_what_does_not_compare_is_refused(runs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"--context 128 is more than the 64 tokens that .*ar.* was trained on"):
        evaluate(*runs.values(), "--context", 128)
    with pytest.raises(UserError, match=r"--context 30 is not a multiple of 4.*k4"):
        evaluate(*runs.values(), "--context", 30)
    with pytest.raises(UserError, match="is an autoencoder, which cannot be compared"):
        evaluate(runs["ar"], runs["k2"] / "autoencoder" / "frozen")


def test_padded_documents_are_scored_under_a_name_of_their_own(
    runs: dict[str, Path],
    tiny_experiment: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Windows of documents that each begin a chunk begin at other tokens, of a text too."""
    frozen, tokens = (tiny_experiment / name for name in ("autoencoder/frozen", "tokens"))
    build_chunks(tokens, load_autoencoder(frozen), tmp_path / "chunks", packing="align")
    changes = [f"run={tmp_path}", f"data.autoencoder={frozen}", f"data.tokens={tokens}", "data.packing=align"]
    changes += [f"data.tokenizer={tiny_experiment / 'tokenizer' / 'tokenizer.model'}"]
    changes += ["training.steps=1", "evaluation.windows=2"]
    changes += ["samples.while_training=true", "samples.prompts=[tone]", "samples.max_tokens=9"]
    formats: list[DocumentFormat] = []
    monkeypatch.setattr(calm_task, "continue_prompts", lambda loaded, *_: formats.append(loaded.documents) or [])
    assert run_calm(config.load(Experiment, tiny_experiment / "config.yaml", changes)) == ExitCode.OK
    [trained] = read_metrics(tmp_path / "calm" / "metrics.jsonl", "eval")
    assert trained["measure"] == "brier_lm@ctx128/stride4/align4"
    assert formats == [DocumentFormat(packing="align")]  # of the texts while training
    evaluate(tmp_path, "--windows", 2)
    assert "brier_lm@ctx128/stride4/align4: " in capsys.readouterr().out
    for source in ([], ["--text", tiny_experiment / "corpus" / "1.txt"]):
        with pytest.raises(UserError, match=r"has another packing of documents than .*; evaluate it by itself"):
            evaluate(runs["k4"], tmp_path, *source, "--context", 48)


def test_one_checkpoint_under_a_shorter_context(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(runs["k4"], "--context", 48, "--windows", 4, "--places", 2)
    shown = capsys.readouterr().out
    assert "4 windows with 2 scored positions each, 8 in " in shown
    assert "brier_lm@ctx48/stride4" in shown
    assert "from the draws" in shown


def test_a_text_is_tokenized_as_the_data_of_the_run(
    runs: dict[str, Path], tiny_experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Documents without eos in training have none in the text; its field is the run's, or the one that is named."""
    tokenizer = load_tokenizer(tiny_experiment / "tokenizer" / "tokenizer.model")
    documents = [path.read_text() for path in sorted(tiny_experiment.glob("corpus/1*.txt"))]
    text = tmp_path / "content.jsonl"
    text.write_text("".join(json.dumps({"content": document}) + "\n" for document in documents))
    data = config.load(Experiment, tiny_experiment / "config.yaml", ["data.eos=false"]).data
    store = tokens_of_text(ScoredText(text, "content"), tokenizer, data, tmp_path)
    tokens = store.read(0, len(store), ("tokens",))["tokens"]
    assert (tokens == tokenizer.bos).sum() == len(documents)
    assert not (tokens == tokenizer.eos).any()
    evaluate(
        runs["k4"], "--text", text, "--text-field", "content", "--windows", 1, "--output", tmp_path / "new" / "x.json"
    )
    found = json.loads((tmp_path / "new" / "x.json").read_text())
    assert found["text"] == {"field": "content", "eos": True, "packing": "pack", "assumed": False}
    assert "documents of the text end with eos, data.packing=pack: as the run's own data" in capsys.readouterr().out
    with pytest.raises(UserError, match="--text-field"):
        evaluate(runs["k4"], "--text", text)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "x.json", tmp_path):
        with pytest.raises(UserError, match=r"Cannot write to .*; name a"):
            evaluate(tmp_path / "no run at all", "--output", output)


def test_a_checkpoint_that_training_removes_gives_way_to_the_newer_one(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(runs["k4"], tmp_path / "k4"))
    [old] = (run / "calm" / "checkpoints").iterdir()
    found: list[Path] = []

    newer = old.with_name("step-3")
    with distributed(ParallelConfig()) as topology:
        from calm_core.evaluation import checkpoint as module

        def find_and_lose(path: Path) -> Path:
            """As the original; training then saves a newer checkpoint and removes the first one found."""
            result = find_checkpoint(path)
            if not found:
                partial = Path(shutil.copytree(old, newer.with_name("step-3.partial")))
                manifest = json.loads((old / "manifest.json").read_text())
                finish(partial, newer, manifest["state"], manifest["files"])
                shutil.rmtree(old)
            found.append(result)
            return result

        monkeypatch.setattr(module, "find_checkpoint", find_and_lose)
        settings = EvaluationConfig(windows=1, samples=4)
        [result] = module.compare([run], None, 0, 0, settings, topology, tmp_path)
    assert found[0] == old
    assert (result["step"], result["checkpoint"]) == (3, str(newer))


def test_all_ranks_score_the_same_checkpoint() -> None:
    assert "taken: ['step-2', 'step-2']" in launch(2, ROOT / "tests" / "helpers" / "late_rank.py")


def test_the_papers_protocol_needs_its_context_or_a_name_of_its_own(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"blocks of 8,192 tokens, is more than the 64 .*--context 64 scores shorter"):
        evaluate(runs["ar"], "--protocol", "paper")
    output = tmp_path / "out.json"
    evaluate(runs["ar"], runs["k4"], "--protocol", "paper", "--context", 64, "--windows", 3, "--output", output)
    ar, calm = json.loads(output.read_text())
    assert ar["paper"]["measure"] == calm["paper"]["measure"] == "brier_lm@paper/ctx64"
    assert (ar["paper"]["places_per_window"], calm["paper"]["places_per_window"]) == (60, 15)
    assert (ar["paper"]["rollout_chunks"], ar["paper"]["samples"]) == (4, 2)
    assert capsys.readouterr().out.count("brier_lm@paper/ctx64") == 2


SOME = EvaluationConfig(windows=6, samples=5, micro_batch=4)


@pytest.fixture
def experiment(tiny_experiment: Path) -> Experiment:
    return config.load(Experiment, tiny_experiment / "config.yaml", [f"run={tiny_experiment}"])


@pytest.fixture
def loaded(topology: Topology, experiment: Experiment) -> Loaded:
    """An untrained model: its head draws the origin, whatever the hidden state."""
    autoencoder, tokenizer = load_autoencoder(experiment.paths.autoencoder), load_tokenizer(experiment.paths.tokenizer)
    shape = ModelShape(experiment.model, experiment.head, tokenizer.vocab_size, 4, autoencoder.config.latent)
    model = CalmModel(transformer_config(shape.backbone, ParallelConfig()), shape).eval()
    initialize([model], 0.3, seed=0)
    return Loaded(model, autoencoder, tokenizer, positions=16)


def stores(experiment: Experiment) -> list[ChunkStore]:
    return [ChunkStore(experiment.paths.chunks, split) for split in ("train", "held_out")]


def test_a_constant_head_has_no_spread_and_ignores_its_hidden_state(topology, loaded, experiment):
    result = evaluate_checkpoint(loaded, topology, *stores(experiment), 0, SOME)
    assert result["spread_samples"] == 0
    assert result["spread_posterior"] > 0
    assert result["loss_shuffled"] == result["loss"]
    assert result["collision_1"] == 1
    assert result["measure"] == "brier_lm@ctx64/stride4"


def test_a_head_that_reads_its_hidden_state_has_another_loss_from_shuffled_ones(topology, loaded, experiment):
    torch.nn.init.normal_(loaded.model.head.out_reduce.weight, std=0.3)
    result = evaluate_checkpoint(loaded, topology, *stores(experiment), 0, SOME)
    assert result["spread_samples"] > 0
    assert result["collision_1"] < 1
    assert result["loss_shuffled"] != result["loss"]
    shown = checkpoint_table(result)
    assert f"{result['bigram_brier_1']:.3%}" in shown
    assert "spread of the draws" in shown


def test_windows_do_not_depend_on_how_many_are_scored_at_once(topology, loaded, experiment):
    torch.nn.init.normal_(loaded.model.head.out_reduce.weight, std=0.3)
    few, many = (
        evaluate_checkpoint(
            loaded, topology, *stores(experiment), 0, EvaluationConfig(windows=6, samples=5, micro_batch=size)
        )
        for size in (1, 6)
    )
    for name in ("brier_1", "loss", "collision_1", "spread_samples", "spread_posterior", "bigram_brier_2"):
        assert few[name] == pytest.approx(many[name], rel=1e-5), name


def test_a_text_becomes_a_store_of_the_models_own_chunks(topology, loaded, experiment, tmp_path):
    text = next(Path(experiment.run).glob("corpus/*.txt"))
    store = chunks_of_text(ScoredText(text), loaded.tokenizer, loaded.autoencoder, experiment.data, tmp_path)
    tokens = [loaded.tokenizer.bos, *loaded.tokenizer.encode(text.read_text()), loaded.tokenizer.eos]
    assert store.read(0, len(store), ("tokens",))["tokens"].ravel()[: len(tokens)].tolist() == tokens
    result = evaluate_checkpoint(loaded, topology, stores(experiment)[0], store, 0, SOME)
    assert result["documents"] == 1
    blocks = result["standard_errors"]["clusters"]
    assert result["standard_errors"]["of"] == "blocks"
    assert result["brier_1_error"] >= 0
    assert f"{blocks - 1} degrees of freedom ({blocks} blocks of positions of one document)" in checkpoint_table(result)


def test_the_papers_protocol_stands_beside_ours(topology, loaded, experiment):
    torch.nn.init.normal_(loaded.model.head.out_reduce.weight, std=0.3)
    ours = evaluate_checkpoint(loaded, topology, *stores(experiment), 0, SOME)
    both = evaluate_checkpoint(loaded, topology, *stores(experiment), 0, SOME, protocol="paper")
    paper = both.pop("paper")
    assert both == ours
    assert paper["measure"] == "brier_lm@paper/ctx64"
    assert (paper["places_per_window"], paper["samples"], paper["windows"]) == (15, 2, 6)
    assert paper["scored_positions"] == 90
    assert paper.keys() >= {f"brier_{n}{e}" for n in range(1, 5) for e in ("", "_error")}
    # Two draws: each score of a position is -1, 0, 1 or 2 - ..., a whole number.
    assert paper["brier_1"] * 90 == pytest.approx(round(paper["brier_1"] * 90))
    shown = checkpoint_table(both | {"paper": paper})
    assert "brier_lm@paper/ctx64: none (Not above zero" in shown
    assert "all 90 positions, 2 draws at each" in shown
    assert "brier_lm@ctx64/stride4: " in shown
