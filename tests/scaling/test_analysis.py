from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
from browser import check_that_it_draws, figures
from known_law import LAW

from calm_core.config.scaling_config import ScalingConfig
from calm_core.io import write_json
from calm_core.plan import flops
from calm_core.scaling.analysis import analyse, best_of_budgets, losses
from calm_core.scaling.points import model_size, shape_of
from calm_core.scaling.results import LAWS, Row, results_path, write_results
from calm_core.scaling.study_report import draw_study, fit_study, write_scaling_page


def test_the_law_behind_the_results_is_found(study: ScalingConfig, rows: list[Row]) -> None:
    joint = analyse(study, rows)["brier_1"]["joint"]["CALM"]
    for name in ("alpha", "beta", "k_exponent", "floor"):
        assert joint["parameters"][name]["value"] == pytest.approx(getattr(LAW, name), abs=0.03), name
        low, high = joint["parameters"][name]["interval"]
        assert low - 1e-3 <= joint["parameters"][name]["value"] <= high + 1e-3
    assert joint["held_out"]["error"] < 1e-3


def test_a_prediction_is_the_laws_own_minimum(study: ScalingConfig, rows: list[Row]) -> None:
    budget = 1e17
    study = replace(study, fit=replace(study.fit, predict=[budget]))
    best = analyse(study, rows)["brier_1"]["joint"]["CALM"]["predictions"][0]
    lost = {}
    for family, k in (("k2", 2.0), ("k4", 4.0)):
        for depth in range(1, 120):
            shape = shape_of(study, family, depth)
            tokens = budget / flops.paper_training(shape, 1, study.grid.context // shape.k)
            lost[family, depth] = float(LAW(np.array([float(model_size(shape))]), np.array([tokens]), np.array([k]))[0])
    assert lost[best["family"], best["depth"]] == pytest.approx(min(lost.values()), abs=1e-4)
    assert max(lost.values()) > min(lost.values()) + 1e-2  # the choice matters
    assert best["loss"] == pytest.approx(min(lost.values()), abs=2e-3)
    assert best["interval"][0] <= best["loss"] <= best["interval"][1]
    assert best["size_interval"][0] <= best["size"] <= best["size_interval"][1]
    assert not best["edge"]


def test_forms_that_the_points_cannot_carry_are_refused(study: ScalingConfig, rows: list[Row]) -> None:
    laws = analyse(study, [row for row in rows if row["depth"] in (4, 6)])
    assert "2 different sizes of one K" in laws["brier_1"]["joint"]["CALM"]["missing"]
    assert "at least 3" in laws["brier_1"]["isoflop"]["k2"]["missing"]
    assert "missing" in laws["brier_lm"]["compute"]["k4"]  # never significant in these runs
    assert "missing" in laws["cross_entropy"]["compute"]["k4"]  # CALM has none
    assert "parameters" in laws["cross_entropy"]["compute"]["ar"]
    by_tokens = replace(study, grid=replace(study.grid, budget="tokens"))
    assert "differ in compute" in analyse(by_tokens, rows)["brier_1"]["isoflop"]["k4"]["missing"]


def test_the_best_of_a_budget_is_the_best_mean_over_seeds(rows: list[Row]) -> None:
    data = losses([row for row in rows if row["family"] == "k4"], "brier_1")
    best = best_of_budgets(data)
    assert best.budget.tolist() == [0, 1, 2, 3]
    for budget, loss in zip(best.budget, best.loss, strict=True):
        assert loss == data.loss[data.budget == budget].min()
    won = int(np.flatnonzero(data.loss == best.loss[0])[0])
    with_another_seed = data.at(np.append(np.arange(len(data.loss)), won))
    with_another_seed.loss[-1] += 0.2
    assert best_of_budgets(with_another_seed).model[0] != data.model[won]


def test_isoflop_minima_grow_with_compute_as_the_law_says(study: ScalingConfig, rows: list[Row]) -> None:
    found = analyse(study, rows)["brier_1"]["isoflop"]["k4"]
    sizes = [minimum["size"] for minimum in found["minima"] if minimum["size"]]
    assert len(sizes) >= 2
    assert sizes == sorted(sizes)
    # N ~ C^(beta / (alpha + beta)) where C = 6 N D; a head and a context make it somewhat less.
    assert found["size_exponent"] == pytest.approx(LAW.beta / (LAW.alpha + LAW.beta), abs=0.08)
    for minimum in found["minima"]:
        if minimum["interval"]:
            assert minimum["interval"][0] <= minimum["size"] <= minimum["interval"][1]


@pytest.fixture
def fitted(study: ScalingConfig, rows: list[Row]) -> ScalingConfig:
    """The study with its results and laws on disk."""
    study = replace(study, fit=replace(study.fit, measures=["brier_1"]))
    Path(study.run).mkdir()
    write_results(rows, results_path(study))
    write_json(Path(study.run) / LAWS, analyse(study, rows))
    return study


def test_the_page_shows_every_point_and_opens_in_a_browser(
    fitted: ScalingConfig, rows: list[Row], tmp_path: Path
) -> None:
    page = write_scaling_page(fitted)
    assert "joint law of CALM" in page.read_text()
    shown = figures(page)
    for family, name in (("ar", "AR"), ("k2", "CALM K=2"), ("k4", "CALM K=4")):
        own = sorted((row for row in rows if row["family"] == family), key=lambda row: row["flops"])
        [trace] = [trace for trace in shown["compute-brier_1"]["data"] if trace.get("name") == name]
        assert (trace["x"], trace["y"]) == ([row["flops"] for row in own], [row["brier_1"] for row in own])
    check_that_it_draws(page, tmp_path / "profile")


def test_the_figures_and_the_text(fitted: ScalingConfig, rows: list[Row]) -> None:
    study = fitted
    paths = draw_study(study)
    assert {path.name for path in paths} >= {"compute_brier_1.png", "isoflop_brier_1.svg", "k_brier_1.png"}
    assert all(path.stat().st_size > 5_000 for path in paths)
    assert len(pandas.read_parquet(results_path(study))) == len(rows)
    said = f"48 of 48 points measured, 48 of them from {results_path(study)} (their runs are not there)\n"
    assert fit_study(study, write=False).startswith(said)
    results_path(study).unlink()
    assert fit_study(study, write=False).startswith("0 of 48 points measured\n")  # no run is there to be collected
