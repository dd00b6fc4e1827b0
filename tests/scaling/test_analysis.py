from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
from known_law import LAW

from calm_core.data.manifest import write_json
from calm_core.report.scaling import write_scaling_page
from calm_core.scaling.analysis import analyse, frontier, losses
from calm_core.scaling.config import ScalingConfig
from calm_core.scaling.figures import draw_study
from calm_core.scaling.report import LAWS, fit_study
from calm_core.scaling.results import Row, results_path, write_results


def test_the_law_behind_the_results_is_found(study: ScalingConfig, rows: list[Row]) -> None:
    joint = analyse(study, rows)["brier_1"]["joint"]["CALM"]
    for name in ("alpha", "beta", "k_exponent", "floor"):
        assert joint["parameters"][name]["value"] == pytest.approx(getattr(LAW, name), abs=0.03), name
        low, high = joint["parameters"][name]["interval"]
        assert low - 1e-3 <= joint["parameters"][name]["value"] <= high + 1e-3
    assert joint["held_out"]["error"] < 1e-3


def test_a_prediction_is_the_laws_own_minimum(study: ScalingConfig, rows: list[Row]) -> None:
    study = replace(study, fit=replace(study.fit, predict=[1e17]))
    best = analyse(study, rows)["brier_1"]["joint"]["CALM"]["predictions"][0]
    foretold = LAW(np.array([best["size"]]), np.array([best["tokens"]]), np.array([float(best["family"][1:])]))[0]
    assert best["loss"] == pytest.approx(foretold, abs=2e-3)
    assert best["interval"][0] <= best["loss"] + 1e-4
    assert best["loss"] <= best["interval"][1] + 1e-4


def test_forms_that_the_points_cannot_carry_are_refused(study: ScalingConfig, rows: list[Row]) -> None:
    laws = analyse(study, [row for row in rows if row["depth"] in (4, 6)])
    assert "2 different sizes of one K" in laws["brier_1"]["joint"]["CALM"]["missing"]
    assert "at least 3" in laws["brier_1"]["isoflop"]["k2"]["missing"]
    assert "missing" in laws["brier_lm"]["compute"]["k4"]  # never significant in these runs
    assert "missing" in laws["cross_entropy"]["compute"]["k4"]  # CALM has none
    assert "parameters" in laws["cross_entropy"]["compute"]["ar"] or "missing" in laws["cross_entropy"]["compute"]["ar"]


def test_the_frontier_is_what_nothing_cheaper_beats(rows: list[Row]) -> None:
    data = losses(rows, "brier_1")
    best = frontier(data)
    for i in best:
        assert not ((data.flops <= data.flops[i]) & (data.loss < data.loss[i])).any()
    assert (np.diff(data.loss[best]) < 0).all()


def test_isoflop_minima_grow_with_compute(study: ScalingConfig, rows: list[Row]) -> None:
    found = analyse(study, rows)["brier_1"]["isoflop"]["k4"]
    sizes = [minimum["size"] for minimum in found["minima"] if minimum["size"]]
    assert sizes == sorted(sizes)


def test_the_figures_and_the_text(study: ScalingConfig, rows: list[Row]) -> None:
    study = replace(study, fit=replace(study.fit, measures=["brier_1"]))
    Path(study.run).mkdir()
    write_results(rows, results_path(study))
    write_json(Path(study.run) / LAWS, analyse(study, rows))
    assert "joint law of CALM" in write_scaling_page(study).read_text()
    paths = draw_study(study)
    assert {path.name for path in paths} >= {"compute_brier_1.png", "isoflop_brier_1.svg", "k_brier_1.png"}
    assert all(path.stat().st_size > 5_000 for path in paths)
    assert len(pandas.read_parquet(results_path(study))) == len(rows)
    assert fit_study(study, write=False).startswith("0 of 48 points measured")  # no run is there to be collected
