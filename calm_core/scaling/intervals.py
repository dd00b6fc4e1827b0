"""Confidence intervals of fitted laws, from losses drawn as they might have been.

Losses differ from the law by a deviation that all points of a run share (its seed, its order of samples) and one of
each point. In units of the standard errors, with P the projection on the means of runs and z ~ N(0, I):

    deviation = scatter ((I - P) + sqrt(ratio) P) z

Scatter and ratio are both unknown: the standard errors count only the choice of scored documents. Both are drawn from
their posterior given the n - p contrasts of the losses that do not depend on the parameters (restricted likelihood;
Patterson and Thompson 1971), with a prior uniform in the logarithms of both. Given the ratio, the scatter is
sqrt(Q / chi-squared with n - p degrees of freedom), so that estimates have the t distribution with n - p degrees of
freedom. Few runs hardly determine the ratio, which makes intervals of what varies between runs long. The deviations
are taken to be at least as large as the standard errors on average.

How often the intervals cover the truth is measured by tests/helpers/interval_coverage.py.
"""

from collections.abc import Sequence

import numpy as np
from scipy.linalg import null_space

from calm_core.scaling.laws import CLIP, Array, robust_scatter

# 1 where points deviate independently; 1 + m rho / (1 - rho) where the m points of a run are correlated by rho.
RATIOS = np.geomspace(0.01, 1000.0, 31)


def draw_losses(
    fitted: Array, gradient: Array, loss: Array, error: Array, runs: Sequence[str], draws: int, seed: int = 0
) -> Array:
    """Losses as they might have been `[draws, n]`, about those of a fitted model of p parameters.

    Args:
        fitted: losses of the model `[n]`.
        gradient: their derivatives by its parameters `[n, p]`.
        loss: measured `[n]`.
        error: their standard errors `[n]`.
        runs: the run of each point.
        draws: how many.
        seed: of the random numbers.
    """
    generator = np.random.default_rng(seed)
    names, run, counts = np.unique(runs, return_inverse=True, return_counts=True)
    mean = (run[:, None] == run) / counts[run]  # P
    contrasts = null_space((gradient / error[:, None]).T, rcond=1e-10)
    deviation = (loss - fitted) / error
    limit = CLIP * robust_scatter(deviation, len(loss) - contrasts.shape[1])
    weights, squares = _posterior(contrasts, mean, contrasts.T @ np.clip(deviation, -limit, limit))
    average = 1 + (RATIOS - 1) * len(names) / len(loss)  # of the variances of the points, where the scatter is 1
    free = contrasts.shape[1]
    index = generator.choice(len(RATIOS), size=draws, p=weights)
    scatter = np.sqrt(np.maximum(squares, free / average)[index] / generator.chisquare(free, draws))
    ratio = RATIOS[index]
    normal = generator.standard_normal((draws, len(loss)))
    shared = normal @ mean
    return fitted + error * scatter[:, None] * (normal - shared + np.sqrt(ratio)[:, None] * shared)


def _posterior(contrasts: Array, mean: Array, observed: Array) -> tuple[Array, Array]:
    """The probability of each ratio given the observed contrasts, and their sum of squares Q under it."""
    logs, squares = [], []
    for ratio in RATIOS:
        covariance = contrasts.T @ (np.eye(len(mean)) + (ratio - 1) * mean) @ contrasts
        squares.append(float(observed @ np.linalg.solve(covariance, observed)))
        free = len(observed)
        logs.append(-0.5 * np.linalg.slogdet(covariance)[1] - 0.5 * free * np.log(max(squares[-1], 1e-30)))
    weights = np.exp(np.array(logs) - max(logs))
    return weights / weights.sum(), np.array(squares)


def interval(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """The central interval that holds this fraction of the values."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
