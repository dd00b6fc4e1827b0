from itertools import product

import numpy as np
import pytest
from interval_coverage import STUDIES, coverage

from calm_core.scaling.intervals import draw_losses, interval
from calm_core.scaling.laws import PowerLaw, fit_power_law

LAW = PowerLaw(floor=0.7, scale=0.1, exponent=0.3, reference=1e18)


@pytest.mark.parametrize("common", [0.0, 0.8])
def test_intervals_cover_the_truth_about_as_often_as_they_say(common: float) -> None:
    """Whether the points go astray each by itself or, for the most part, all of a run alike."""
    generator = np.random.default_rng(0)
    x, runs = np.geomspace(1e16, 1e21, 30), [f"run {number // 3}" for number in range(30)]
    error, covered = np.full(x.size, 1e-3), 0
    for trial in range(30):
        noise = common**0.5 * np.repeat(generator.standard_normal(10), 3)
        loss = LAW(x) + 2e-3 * (noise + (1 - common) ** 0.5 * generator.standard_normal(30))
        found = fit_power_law(x, loss, error)
        drawn = draw_losses(found(x), found.gradient(x), loss, error, runs, draws=60, seed=trial)
        laws = [fit_power_law(x, one, error, found) for one in drawn]
        assert {one.reference for one in laws} == {found.reference}
        low, high = interval([one.exponent for one in laws], 0.9)
        covered += low <= 0.3 <= high
    assert 22 <= covered <= 30  # 27 of 30 on average


@pytest.mark.parametrize("name", STUDIES)
def test_intervals_cover_where_runs_scatter_more_than_their_standard_errors(name: str) -> None:
    found = coverage(STUDIES[name], scatter=3.0, shared=0.0, trials=60, draws=60)
    assert 0.82 <= np.mean(list(found.values())) <= 0.98, found  # 0.60 by normal multiples of the residuals


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", STUDIES)
def test_coverage_is_between_85_and_95_per_cent(name: str) -> None:
    trials = 120
    study = STUDIES[name]
    correlations = (0.0, 0.8) if len(set(study.runs)) < len(study.runs) else (0.0,)
    for scatter, shared in product((1.0, 3.0), correlations):
        found = coverage(study, scatter, shared, trials, draws=100)
        for parameter, covered in found.items():
            error = (covered * (1 - covered) / trials) ** 0.5
            assert 0.85 - 2 * error <= covered <= 0.95 + 2 * error, (scatter, shared, parameter, covered)


def test_a_law_through_its_points_is_as_uncertain_as_they_are() -> None:
    x = np.geomspace(1e16, 1e21, 30)

    def width(error: float) -> float:
        errors = np.full(x.size, error)
        drawn = draw_losses(LAW(x), LAW.gradient(x), LAW(x), errors, [str(i) for i in x], draws=40)
        low, high = interval([fit_power_law(x, loss, errors, LAW).exponent for loss in drawn], 0.9)
        return high - low

    assert 5 < width(1e-3) / width(1e-4) < 20
