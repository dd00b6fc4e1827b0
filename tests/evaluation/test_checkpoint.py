from pathlib import Path

import pytest
import torch

from calm_core import config
from calm_core.autoencoder.artefact import load_autoencoder
from calm_core.config.experiment import EvaluationConfig, Experiment
from calm_core.config.model_config import ModelShape
from calm_core.config.parallel_config import ParallelConfig
from calm_core.data.store import ChunkStore
from calm_core.distributed.topology import Topology
from calm_core.evaluation.checkpoint import evaluate_checkpoint
from calm_core.evaluation.comparison import ScoredText, chunks_of_text
from calm_core.evaluation.tables import checkpoint_table
from calm_core.inference.load_model import Loaded
from calm_core.model.backbone import transformer_config
from calm_core.model.calm import CalmModel
from calm_core.model.parameters import initialize
from calm_core.tokenizer import load_tokenizer

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
