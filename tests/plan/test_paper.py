"""The paper's table, from the shipped configurations."""

import pytest
from launching import ROOT

from calm_core import config
from calm_core.config.experiment import Experiment
from calm_core.config.model_config import AutoencoderConfig, ModelShape
from calm_core.plan import flops
from calm_core.plan.autoencoder_account import autoencoder_shape
from calm_core.plan.dry_run import model_shape
from calm_core.plan.paper import ROWS, comparison, missing_head, ours

AUTOENCODER = autoencoder_shape(AutoencoderConfig(), 128_257, 4)


def shape(name: str) -> ModelShape:
    return model_shape(config.load(Experiment, ROOT / "configs" / f"{name}.yaml", []))


@pytest.mark.parametrize("name", ROWS)
def test_the_shipped_models_are_those_of_the_table(name: str) -> None:
    parameters, training, inference = ours(shape(name), AUTOENCODER)
    assert parameters == pytest.approx(ROWS[name].parameters, rel=0.01)
    assert inference == pytest.approx(ROWS[name].inference, rel=0.05)
    if name != "calm_xl":
        assert training == pytest.approx(ROWS[name].training, rel=0.05)


def test_what_the_largest_model_would_need() -> None:
    model, target = shape("calm_xl"), ROWS["calm_xl"].training
    lighter = missing_head(model, target)
    assert lighter == pytest.approx(0.19, abs=0.01)
    head = 3 * flops.PAPER_TOKENS / 4 * 8 * flops.head(model).forward
    assert flops.paper_training(model) - lighter * head == pytest.approx(target)
    assert "head 19% lighter" in comparison({"calm_xl": (model, AUTOENCODER)})
