"""What the sections of an experiment say of themselves."""

from calm_core.config.experiment import Experiment
from calm_core.config.schema import flatten_schema

COMPARED = (
    "seed",
    "data",
    "tokenizer",
    "autoencoder",
    "autoencoder_training",
    "model",
    "head",
    "training",
    "evaluation",
)


def test_every_field_that_runs_are_compared_by_says_what_it_decides():
    silent = [
        key
        for key, leaf in flatten_schema(Experiment).items()
        if key.partition(".")[0] in COMPARED and leaf.belongs_to is None
    ]
    assert silent == []


def test_what_decides_the_shape_of_the_weights():
    weights = [key for key, leaf in flatten_schema(Experiment).items() if leaf.belongs_to == "weights"]
    assert weights == [
        *(f"autoencoder.{name}" for name in ("hidden", "latent", "ffn", "norm_eps")),
        *(f"autoencoder_training.token_loss.{name}" for name in ("rank", "tokens")),
        *(f"model.{name}" for name in ("layers", "hidden", "ffn", "heads", "kv_groups", "norm_eps", "rope_base")),
        *(f"head.{name}" for name in ("kind", "blocks", "noise")),
        *(f"training.token_loss.{name}" for name in ("rank", "tokens")),
    ]
