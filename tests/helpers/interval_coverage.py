"""How often the 90 % intervals of fitted laws cover the truth, on simulated studies.

`python tests/helpers/interval_coverage.py [TRIALS]` prints a table, with the standard errors of the coverage.
"""

import sys
from dataclasses import dataclass
from itertools import product

import numpy as np

from calm_core.scaling.laws import JointLaw, PowerLaw, draw_losses, fit_joint, fit_power_law, interval

POWER = PowerLaw(floor=0.7, scale=0.1, exponent=0.3, reference=1e18)

JOINT = JointLaw(floor=0.6, a=0.1, alpha=0.4, b=0.15, beta=0.25, k_exponent=0.5, n_reference=1e8, d_reference=1e10)

ERROR = 1e-3


@dataclass(frozen=True)
class Study:
    """A law, where it is measured, and the run of each point."""

    law: PowerLaw | JointLaw
    at: tuple[np.ndarray, ...]
    runs: np.ndarray
    fit: object
    shown: tuple[str, ...]


def twelve_points() -> Study:
    """A power law over five decades of compute, each point a run."""
    return Study(POWER, (np.geomspace(1e16, 1e21, 12),), np.arange(12), fit_power_law, ("floor", "exponent"))


def four_runs() -> Study:
    """A joint law through models of four sizes at four budgets."""
    n, compute = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(1e17, 1e20, 4)))
    at = n, compute / (6 * n), np.full(n.size, 4.0)
    return Study(JOINT, at, np.unique(n, return_inverse=True)[1], fit_joint, ("floor", "alpha", "beta"))


STUDIES = {"12 points": twelve_points(), "joint law of 4 runs": four_runs()}


def coverage(study: Study, scatter: float, shared: float, trials: int, draws: int) -> dict[str, float]:
    """The fraction of trials whose interval covers each parameter, where points scatter by this many standard errors.

    `shared` is the correlation of the deviations of a run's points.
    """
    law, count = study.law, len(study.runs)
    error, names = np.full(count, ERROR), [str(run) for run in study.runs]
    covered = dict.fromkeys(study.shown, 0)
    for trial in range(trials):
        generator = np.random.default_rng((trial, 7))
        of_run = generator.standard_normal(count)[study.runs]
        deviation = shared**0.5 * of_run + (1 - shared) ** 0.5 * generator.standard_normal(count)
        loss = law(*study.at) + scatter * error * deviation
        found = study.fit(*study.at, loss, error)
        drawn = draw_losses(found(*study.at), found.gradient(*study.at), loss, error, names, draws, seed=trial)
        laws = [study.fit(*study.at, one, error, found) for one in drawn]
        for name in study.shown:
            low, high = interval([one.parameters[name] for one in laws], 0.9)
            covered[name] += low <= law.parameters[name] <= high
    return {name: hits / trials for name, hits in covered.items()}


def table(trials: int, draws: int = 100) -> str:
    """The coverage of every study, with scatter of 1 and 3 standard errors, of points alone and shared by runs."""
    lines = []
    for (name, study), scatter, shared in product(STUDIES.items(), (1.0, 3.0), (0.0, 0.8)):
        if shared and len(set(study.runs)) == len(study.runs):
            continue
        found = coverage(study, scatter, shared, trials, draws)
        shown = ", ".join(f"{key} {c:.3f} ± {(c * (1 - c) / trials) ** 0.5:.3f}" for key, c in found.items())
        lines.append(f"{name}, scatter {scatter:g}, correlation within a run {shared:g}: {shown}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(int(sys.argv[1]) if len(sys.argv) > 1 else 400))
