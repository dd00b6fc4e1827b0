"""Saturating power laws of a loss (1 - Brier-n, 100 - BrierLM or cross-entropy) with confidence intervals.

    loss(x) = floor + scale (x / reference)^(-exponent)                          one variable: compute
    loss(N, D, K) = floor + K^k_exponent (a (N / N0)^-alpha + b (D / D0)^-beta)  size, tokens, tokens per chunk

The fit is by robust least squares, with residuals in the standard errors of the losses. Runs may scatter more than
their standard errors say, so the fit first estimates that scatter; residuals beyond twice the scatter count linearly
(soft L1) rather than squared, and a failed run does not bend the law. Floor and scales are not negative. Needs only
numpy and scipy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import null_space
from scipy.optimize import least_squares, nnls

Array = NDArray[np.float64]

EXPONENTS = np.geomspace(0.02, 2.0, 13)  # where the search starts

K_EXPONENTS = np.linspace(-0.5, 1.5, 5)

MAX_EXPONENT = 4.0  # a larger exponent is a step rather than a law

BOUND_TOLERANCE = 1e-4  # a parameter this close to a bound counts as lying on it; relative to 1 or to the losses

LINEAR_BEYOND = 2.0  # residuals count linearly beyond this many times the scatter

CLIP = 2.5  # residuals are clipped at this many times the scatter when the scatter is estimated

CLIPPED_VARIANCE = 0.9776  # of a standard normal variable clipped at 2.5

# 1 where points deviate independently; 1 + m rho / (1 - rho) where the m points of a run are correlated by rho.
RATIOS = np.geomspace(0.01, 1000.0, 31)

Law = TypeVar("Law", "PowerLaw", "JointLaw")


class TooFewError(ValueError):
    """The points cannot determine the form; the message says what is missing."""


@dataclass(frozen=True)
class PowerLaw:
    """loss(x) = floor + scale (x / reference)^(-exponent).

    `scatter` is the standard deviation of the losses about the law, in their standard errors; at least 1.
    """

    floor: float
    scale: float
    exponent: float
    reference: float
    scatter: float = 1.0

    def __call__(self, x: Array) -> Array:
        """The loss at `x`."""
        return self.floor + self.scale * (np.asarray(x, float) / self.reference) ** -self.exponent

    def gradient(self, x: Array) -> Array:
        """Derivatives of the loss at `x` `[n]` by floor, scale and exponent `[n, 3]`."""
        ratio = np.asarray(x, float) / self.reference
        power = ratio**-self.exponent
        return np.stack([np.ones_like(ratio), power, -self.scale * power * np.log(ratio)], -1)

    @property
    def parameters(self) -> dict[str, float]:
        """The fitted parameters by name."""
        return {"floor": self.floor, "scale": self.scale, "exponent": self.exponent}

    @property
    def undetermined(self) -> list[str]:
        """The parameters at a bound of the fit: the points do not determine them."""
        return _at_bounds(self.parameters, exponents=("exponent",), typical=self.floor + self.scale)


@dataclass(frozen=True)
class JointLaw:
    """loss(N, D, K) = floor + K^k_exponent (a (N / N0)^-alpha + b (D / D0)^-beta).

    With a single K, k_exponent is 0. `scatter` is the standard deviation of the losses about the law, in their standard
    errors; at least 1.
    """

    floor: float
    a: float
    alpha: float
    b: float
    beta: float
    k_exponent: float
    n_reference: float
    d_reference: float
    scatter: float = 1.0

    def __call__(self, n: Array, d: Array, k: Array) -> Array:
        """The loss of models of N parameters after D tokens at K tokens per chunk."""
        size, data = self._powers(n, d, k)
        return self.floor + self.a * size + self.b * data

    def gradient(self, n: Array, d: Array, k: Array) -> Array:
        """Derivatives of the loss at `[n]` points by floor, a, b, alpha, beta and k_exponent `[n, 6]`."""
        size, data = self._powers(n, d, k)
        columns = [
            np.ones_like(size),
            size,
            data,
            -self.a * size * np.log(n / self.n_reference),
            -self.b * data * np.log(d / self.d_reference),
            (self.a * size + self.b * data) * np.log(k),
        ]
        return np.stack(columns, -1)

    def _powers(self, n: Array, d: Array, k: Array) -> tuple[Array, Array]:
        penalty = np.asarray(k, float) ** self.k_exponent
        size = (np.asarray(n, float) / self.n_reference) ** -self.alpha
        data = (np.asarray(d, float) / self.d_reference) ** -self.beta
        return penalty * size, penalty * data

    @property
    def parameters(self) -> dict[str, float]:
        """The fitted parameters by name."""
        names = ("floor", "a", "alpha", "b", "beta", "k_exponent")
        return {name: getattr(self, name) for name in names}

    @property
    def undetermined(self) -> list[str]:
        """The parameters at a bound of the fit: the points do not determine them."""
        parameters = {name: value for name, value in self.parameters.items() if name != "k_exponent"}
        found = _at_bounds(parameters, exponents=("alpha", "beta"), typical=self.floor + self.a + self.b)
        return [*found, *(["k_exponent"] if abs(self.k_exponent) > MAX_EXPONENT - BOUND_TOLERANCE else [])]


def fit_power_law(x: Array, loss: Array, error: Array, near: PowerLaw | None = None) -> PowerLaw:
    """The power law through losses `[n]` with standard errors `[n]` at `x` `[n]`.

    With `near`, the search starts from that law and keeps its reference and scatter; the scales of two laws compare
    only if their references are equal.

    Raises:
        TooFewError: with fewer than 4 different `x`, one more than the law has parameters.
    """
    _require(x, 4, "values of compute")
    reference = _geometric_mean(x) if near is None else near.reference

    def law(parameters: Array, scatter: float) -> PowerLaw:
        floor, scale, exponent = parameters.tolist()
        return PowerLaw(floor, scale, exponent, reference, scatter)

    bounds = [(0.0, np.inf), (0.0, np.inf), (0.0, MAX_EXPONENT)]
    grid = EXPONENTS[:, None] if near is None else np.array([[near.exponent]])
    return _fit(law, (x,), loss, error, grid, bounds, near and near.scatter)


def fit_joint(n: Array, d: Array, k: Array, loss: Array, error: Array, near: JointLaw | None = None) -> JointLaw:
    """The joint law through losses `[n]` with standard errors `[n]` of models of N, D and K `[n]`; `near` as above.

    Raises:
        TooFewError: if no K has 3 sizes, with fewer than 3 numbers of tokens, or no more points than parameters.
    """
    values, counts = np.unique(k, return_counts=True)
    _require(n[k == values[np.argmax(counts)]] if len(n) else n, 3, "sizes of one K")
    _require(d, 3, "numbers of tokens")
    several = len(values) > 1
    if len(loss) <= 5 + several:
        raise TooFewError(f"{len(loss)} points for {5 + several} parameters: at least one more point is needed.")
    n_reference, d_reference = (
        (_geometric_mean(n), _geometric_mean(d)) if near is None else (near.n_reference, near.d_reference)
    )

    def law(parameters: Array, scatter: float) -> JointLaw:
        floor, a, b, alpha, beta, k_exponent = [*parameters.tolist(), 0.0][:6]
        return JointLaw(floor, a, alpha, b, beta, k_exponent, n_reference, d_reference, scatter)

    axes = [EXPONENTS[::3], EXPONENTS[::3], K_EXPONENTS]
    if near is not None:
        axes = [np.array([exponent]) for exponent in (near.alpha, near.beta, near.k_exponent)]
    bounds = [(0.0, np.inf)] * 3 + [(0.0, MAX_EXPONENT)] * 2 + [(-MAX_EXPONENT, MAX_EXPONENT)] * several
    grid = np.stack(np.meshgrid(*axes[: 2 + several], indexing="ij"), -1).reshape(-1, 2 + several)
    return _fit(law, (n, d, k), loss, error, grid, bounds, near and near.scatter)


def _fit(
    make: Callable[[Array, float], Law],
    at: tuple[Array, ...],
    loss: Array,
    error: Array,
    grid: Array,
    bounds: Sequence[tuple[float, float]],
    scatter: float | None,
) -> Law:
    """The law that fits losses `[n]` best, `make(parameters, scatter)` with the linear parameters first.

    Given the exponents the law is linear: the fit starts from the point of the grid of exponents `[m, e]` whose linear
    parameters, by non-negative least squares, leave the smallest residual. An unknown scatter is estimated on the way.
    """
    exponents, low, high = grid.shape[1], *np.array(bounds).T
    linear = len(bounds) - exponents

    def gradient(parameters: Array) -> Array:
        return make(parameters, 1.0).gradient(*at)[:, : len(bounds)] / error[:, None]

    def residuals(parameters: Array) -> Array:
        return (make(parameters, 1.0)(*at) - loss) / error

    tolerance = 1e-8 if scatter is None else 1e-5  # draws need not be exact, and flat directions take hundreds of steps

    def fit(start: Array, scale: float) -> Array:
        start = np.clip(start, low + 1e-9, np.minimum(high, 1e9) - 1e-9)
        options = {"loss": "soft_l1", "f_scale": scale, "x_scale": "jac", "max_nfev": 300, "ftol": tolerance}
        return least_squares(residuals, start, gradient, (low, high), **options).x

    starts = [(*nnls(gradient(np.append(np.zeros(linear), point))[:, :linear], loss / error), point) for point in grid]
    first, _, point = min(starts, key=lambda start: start[1])
    found = np.append(first, point)
    if scatter is not None:
        return make(fit(found, LINEAR_BEYOND * scatter), scatter)
    # Absolute residuals first, which no single run can bend, then twice with the scatter that they show.
    scatter = 0.5
    for _ in range(3):
        found = fit(found, LINEAR_BEYOND * scatter)
        scatter = max(1.0, robust_scatter(residuals(found), len(bounds)))
    return make(found, scatter)


def robust_scatter(residuals: Array, parameters: int) -> float:
    """The standard deviation behind residuals `[n]` of a fit of some parameters, by Huber's proposal 2.

    Residuals count for at most 2.5 standard deviations, and n - p of them are free. (P. J. Huber, Robust Statistics,
    section 6.4.)
    """
    squares, free = np.square(residuals), max(1, len(residuals) - parameters)
    variance = float(squares.sum()) / free
    for _ in range(50):
        variance = float(np.minimum(squares, CLIP**2 * variance).sum()) / (free * CLIPPED_VARIANCE)
    return variance**0.5


def _at_bounds(parameters: Mapping[str, float], exponents: Sequence[str], typical: float) -> list[str]:
    """Exponents at 0 or at `MAX_EXPONENT`; floor and scales at 0, relative to `typical` losses."""
    return [
        name
        for name, value in parameters.items()
        if (
            not BOUND_TOLERANCE < value < MAX_EXPONENT - BOUND_TOLERANCE
            if name in exponents
            else value < BOUND_TOLERANCE * typical
        )
    ]


def _geometric_mean(values: Array) -> float:
    """As the reference, it correlates the estimates of scale and exponent least."""
    return float(np.exp(np.mean(np.log(values))))


def _require(values: Array, least: int, what: str) -> None:
    different = len(np.unique(values))
    if different < least:
        raise TooFewError(f"{different} different {what}: at least {least} are needed.")


def draw_losses(
    fitted: Array, gradient: Array, loss: Array, error: Array, runs: Sequence[str], draws: int, seed: int = 0
) -> Array:
    """Losses as they might have been `[draws, n]`, about those of a fitted model of p parameters.

    Losses differ from the law by a deviation that all points of a run share (its seed, its order of samples) and one of
    each point. In units of the standard errors, with P the projection on the means of runs and z ~ N(0, I):

        deviation = scatter ((I - P) + sqrt(ratio) P) z

    Scatter and ratio are both unknown: the standard errors count only the choice of scored documents. Both are drawn
    from their posterior given the n - p contrasts of the losses that do not depend on the parameters (restricted
    likelihood; Patterson and Thompson 1971), with a prior uniform in the logarithms of both. Given the ratio, the
    scatter is sqrt(Q / chi-squared with n - p degrees of freedom), so that estimates have the t distribution with n - p
    degrees of freedom. A few runs hardly determine the ratio, so intervals of what varies between runs are wide. The
    deviations are taken to be at least as large as the standard errors on average.

    How often the intervals cover the truth is measured by tests/helpers/interval_coverage.py.

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
