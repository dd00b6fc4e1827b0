from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from calm_core.report.figure import plot_brier, plot_loss, plot_noise_curve

TRAIN = [{"step": step, "loss": 10 / step} for step in range(1, 20)] + [{"step": 20, "loss": None}]
EVALUATIONS = [
    {"step": step, "loss": 9 / step, "loss_error": 0.1, "unigram_brier_1": 0.01, "unigram_brier_2": 1e-4}
    | {f"brier_{n}": step / 1000 / n for n in (1, 2)}
    | {"brier_1_error": 0.001, "brier_2_error": None}
    for step in (5, 10, 20)
]


def picture(path: Path) -> np.ndarray:
    return matplotlib.image.imread(path)[..., :3]


def colours(path: Path) -> int:
    """Pixels that are neither black, grey nor white: those of the curves."""
    pixels = picture(path)
    return int((np.ptp(pixels, axis=-1) > 0.3).sum())


def test_the_loss_is_drawn_from_the_records(tmp_path):
    plot_loss(TRAIN, EVALUATIONS, "a loss", tmp_path / "both.png")
    plot_loss(TRAIN, [{"step": 5, "token_accuracy": 1.0}], "a loss", tmp_path / "train.png")
    plot_loss([], [], "a loss", tmp_path / "empty.png")
    assert colours(tmp_path / "both.png") > colours(tmp_path / "train.png") > 300
    assert colours(tmp_path / "empty.png") == 0
    assert picture(tmp_path / "empty.png").min() < 0.1  # axes and title are there


@pytest.mark.parametrize("depth", [1, 2])
def test_brier_has_a_panel_for_each_number_of_tokens(tmp_path, depth):
    records = [{k: v for k, v in r.items() if depth == 2 or "brier_2" not in k} for r in EVALUATIONS]
    plot_brier(records, tmp_path / "brier.png")
    assert colours(tmp_path / "brier.png") > 300
    assert picture(tmp_path / "brier.png").shape[1] == 600 * depth


def test_the_curve_over_noise_is_drawn(tmp_path):
    evaluation = {"noise_curve": [[0.0, 1.0], [0.5, 0.8], [1.0, 0.1]], "mean_sigma": 0.3}
    plot_noise_curve(evaluation, tmp_path / "noise.png")
    assert colours(tmp_path / "noise.png") > 300
