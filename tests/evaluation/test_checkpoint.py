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
from calm_core.evaluation.comparison import chunks_of_text
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
    """An untrained model: its head says the origin, whatever it hears."""
    autoencoder, tokenizer = load_autoencoder(experiment.paths.autoencoder), load_tokenizer(experiment.paths.tokenizer)
    shape = ModelShape(experiment.model, experiment.head, tokenizer.vocab_size, 4, autoencoder.config.latent)
    model = CalmModel(transformer_config(shape.backbone, ParallelConfig()), shape).eval()
    initialize([model], 0.3, seed=0)
    return Loaded(model, autoencoder, tokenizer, positions=16)


def stores(experiment: Experiment) -> list[ChunkStore]:
    return [ChunkStore(experiment.paths.chunks, split) for split in ("train", "held_out")]


def test_a_constant_head_has_no_spread_and_does_not_listen(loaded, experiment):
    result = evaluate_checkpoint(loaded, *stores(experiment), 0, SOME)
    assert result["spread_samples"] == 0
    assert result["spread_posterior"] > 0
    assert result["loss_shuffled"] == result["loss"]
    assert result["collision_1"] == 1
    assert result["measure"] == "brier_lm@ctx64/stride8"


def test_a_head_that_listens_loses_or_gains_by_shuffled_hidden_states(loaded, experiment):
    torch.nn.init.normal_(loaded.model.head.out_reduce.weight, std=0.3)
    result = evaluate_checkpoint(loaded, *stores(experiment), 0, SOME)
    assert result["spread_samples"] > 0
    assert result["collision_1"] < 1
    assert result["loss_shuffled"] != result["loss"]
    shown = checkpoint_table(result)
    assert f"{result['bigram_brier_1']:.3%}" in shown
    assert "spread of the samples" in shown


def test_windows_do_not_depend_on_how_many_are_scored_at_once(loaded, experiment):
    torch.nn.init.normal_(loaded.model.head.out_reduce.weight, std=0.3)
    few, many = (
        evaluate_checkpoint(loaded, *stores(experiment), 0, EvaluationConfig(windows=6, samples=5, micro_batch=size))
        for size in (1, 6)
    )
    for name in ("brier_1", "loss", "collision_1", "spread_samples", "spread_posterior", "bigram_brier_2"):
        assert few[name] == pytest.approx(many[name], rel=1e-5), name


def test_a_text_becomes_a_store_of_the_models_own_chunks(loaded, experiment, tmp_path):
    text = next(Path(experiment.run).glob("corpus/*.txt"))
    store = chunks_of_text(text, loaded.tokenizer, loaded.autoencoder, tmp_path)
    tokens = [loaded.tokenizer.bos, *loaded.tokenizer.encode(text.read_text()), loaded.tokenizer.eos]
    assert store.read(0, len(store), ("tokens",))["tokens"].ravel()[: len(tokens)].tolist() == tokens
    result = evaluate_checkpoint(loaded, stores(experiment)[0], store, 0, SOME)
    assert result["documents"] == 1
    assert result["brier_1_error"] is None
    assert "±" not in checkpoint_table(result)
