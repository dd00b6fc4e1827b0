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


# Ours over the paper's, where it is not 1 to the digits that the paper prints (see `plan.paper`).
TRAINING = {"ar_m": 1.010, "calm_l": 1.043, "calm_xl": 1.102}
INFERENCE = {"ar_m": 1.015, "calm_xl": 1.033}
PRINTED = {"training": 0.05e20, "inference": 0.05e8}  # half of the last digit


@pytest.mark.parametrize("name", ROWS)
def test_the_shipped_models_are_those_of_the_table(name: str) -> None:
    row = ROWS[name]
    parameters, training, inference = ours(shape(name), AUTOENCODER)
    assert parameters == pytest.approx(row.parameters, rel=0.01)
    assert training == pytest.approx(row.training * TRAINING.get(name, 1), abs=PRINTED["training"])
    assert inference == pytest.approx(row.inference * INFERENCE.get(name, 1), abs=PRINTED["inference"])
    for miss, theirs, found, digit in (
        (TRAINING.get(name), row.training, training, PRINTED["training"]),
        (INFERENCE.get(name), row.inference, inference, PRINTED["inference"]),
    ):
        assert (miss is not None) == (abs(found - theirs) > digit)
        assert miss is None or found / theirs == pytest.approx(miss, abs=5e-4)


def test_no_head_that_grows_with_the_square_of_the_width_fits_both_models() -> None:
    left = {}
    for name in ("calm_m", "calm_l"):
        model = shape(name)
        head = 3 * flops.PAPER_TOKENS / 4 * 8 * flops.head(model).forward
        rest, row = flops.paper_training(model) - head, ROWS[name]
        left[name] = row.training - PRINTED["training"] - rest, row.training + PRINTED["training"] - rest
    largest = left["calm_l"][1] / left["calm_m"][0]
    assert largest == pytest.approx(2.21, abs=0.01)
    assert largest < (1536 / 1024) ** 2


def test_what_the_largest_model_would_need() -> None:
    model, target = shape("calm_xl"), ROWS["calm_xl"].training
    lighter = missing_head(model, target)
    assert lighter == pytest.approx(0.19, abs=0.01)
    head = 3 * flops.PAPER_TOKENS / 4 * 8 * flops.head(model).forward
    assert flops.paper_training(model) - lighter * head == pytest.approx(target)
    assert "head 19% lighter" in comparison({"calm_xl": (model, AUTOENCODER)})
