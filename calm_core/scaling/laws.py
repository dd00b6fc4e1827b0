"""Saturating power laws, fitted by robust least squares to what is lost: 1 - Brier-n, 100 - BrierLM, or cross-entropy.

    loss(x) = floor + scale (x / reference)^(-exponent)                          one variable: compute
    loss(N, D, K) = floor + K^k_exponent (a (N / N0)^-alpha + b (D / D0)^-beta)  size, tokens, tokens per chunk

Residuals are divided by the standard errors of the losses and pass through a soft L1 loss, so that a run that went
wrong does not bend the law. Floor and scales are not negative. numpy and scipy alone; proven on laws that are known.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

Array = NDArray[np.float64]

EXPONENTS = np.geomspace(0.02, 2.0, 13)  # where the search begins

K_EXPONENTS = np.linspace(-0.5, 1.5, 5)

MOST = 4.0  # a larger exponent is a step, not a law

EDGE = 1e-4  # as near to an end of its range a parameter counts as lying there, relative to 1 or to the losses


class TooFewError(ValueError):
    """The points cannot determine the form; the message says what is missing."""


@dataclass(frozen=True)
class PowerLaw:
    """loss(x) = floor + scale (x / reference)^(-exponent)."""

    floor: float
    scale: float
    exponent: float
    reference: float

    def __call__(self, x: Array) -> Array:
        """The loss at `x`."""
        return self.floor + self.scale * (np.asarray(x, float) / self.reference) ** -self.exponent

    @property
    def parameters(self) -> dict[str, float]:
        """What an interval can be given for."""
        return {"floor": self.floor, "scale": self.scale, "exponent": self.exponent}

    @property
    def undetermined(self) -> list[str]:
        """The parameters at an end of what the fit allows: the points do not say where they lie."""
        return _at_ends(self.parameters, exponents=("exponent",), typical=self.floor + self.scale)


@dataclass(frozen=True)
class JointLaw:
    """loss(N, D, K) = floor + K^k_exponent (a (N / N0)^-alpha + b (D / D0)^-beta); one K leaves k_exponent at 0."""

    floor: float
    a: float
    alpha: float
    b: float
    beta: float
    k_exponent: float
    n_reference: float
    d_reference: float

    def __call__(self, n: Array, d: Array, k: Array) -> Array:
        """The loss of models of N parameters after D tokens at K tokens per chunk."""
        size = self.a * (np.asarray(n, float) / self.n_reference) ** -self.alpha
        data = self.b * (np.asarray(d, float) / self.d_reference) ** -self.beta
        return self.floor + np.asarray(k, float) ** self.k_exponent * (size + data)

    @property
    def parameters(self) -> dict[str, float]:
        """What an interval can be given for."""
        names = ("floor", "a", "alpha", "b", "beta", "k_exponent")
        return {name: getattr(self, name) for name in names}

    @property
    def undetermined(self) -> list[str]:
        """The parameters at an end of what the fit allows: the points do not say where they lie."""
        parameters = {name: value for name, value in self.parameters.items() if name != "k_exponent"}
        ends = _at_ends(parameters, exponents=("alpha", "beta"), typical=self.floor + self.a + self.b)
        return [*ends, *(["k_exponent"] if abs(self.k_exponent) > MOST - EDGE else [])]


def fit_power_law(x: Array, loss: Array, error: Array, near: PowerLaw | None = None) -> PowerLaw:
    """The power law through losses `[n]` with standard errors `[n]` at `x` `[n]`.

    The search may begin `near` another law, whose reference is kept: only then are the scales of two laws comparable.

    Raises:
        TooFewError: with fewer than 4 different `x`, one more than the law has parameters.
    """
    _require(x, 4, "values of compute")
    reference = _middle(x) if near is None else near.reference
    scaled = x / reference

    def columns(exponents: Array) -> Array:
        return np.stack([np.ones_like(scaled), scaled ** -exponents[0]], -1)

    starts = [EXPONENTS] if near is None else [np.array([near.exponent])]
    (floor, scale), (exponent,) = _fit(columns, starts, loss, error, [(0.0, MOST)])
    return PowerLaw(floor, scale, exponent, reference)


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
    n_reference, d_reference = (_middle(n), _middle(d)) if near is None else (near.n_reference, near.d_reference)

    def columns(exponents: Array) -> Array:
        alpha, beta, k_exponent = exponents if several else (*exponents, 0.0)
        penalty = k**k_exponent
        return np.stack(
            [np.ones_like(n), penalty * (n / n_reference) ** -alpha, penalty * (d / d_reference) ** -beta], -1
        )

    starts = [EXPONENTS[::3], EXPONENTS[::3], K_EXPONENTS]
    if near is not None:
        starts = [np.array([exponent]) for exponent in (near.alpha, near.beta, near.k_exponent)]
    bounds = [(0.0, MOST), (0.0, MOST), *([(-MOST, MOST)] if several else [])]
    (floor, a, b), exponents = _fit(columns, starts[: len(bounds)], loss, error, bounds)
    alpha, beta, k_exponent = exponents if several else (*exponents, 0.0)
    return JointLaw(floor, a, alpha, b, beta, k_exponent, n_reference, d_reference)


def bootstrap(
    refit: Callable[[Array], PowerLaw | JointLaw],
    fitted: Array,
    loss: Array,
    error: Array,
    runs: Sequence[str],
    draws: int,
    seed: int = 0,
) -> list[PowerLaw | JointLaw]:
    """Laws of losses as they might have been: a wild bootstrap, by runs.

    A draw moves the losses of a run away from the law by its residuals times one standard normal number: what is
    peculiar to a run, its seed included, is common to its rows. A residual counts as at least a standard error, since
    a law that goes through its points has not made them exact. All points stay, so that every draw determines the form.

    Args:
        refit: the law through losses `[n]` at the same points.
        fitted: the law's losses `[n]`.
        loss: measured.
        error: their standard errors.
        runs: the run of each.
        draws: how many laws.
        seed: of the normal numbers.
    """
    generator = np.random.default_rng(seed)
    residual = np.where(loss < fitted, -1.0, 1.0) * np.maximum(np.abs(loss - fitted), error)
    names, of_run = np.unique(runs, return_inverse=True)
    return [refit(fitted + generator.standard_normal(len(names))[of_run] * residual) for _ in range(draws)]


def interval(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """The central interval that holds this share of the values."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _fit(
    columns: Callable[[Array], Array],
    starts: Sequence[Array],
    loss: Array,
    error: Array,
    bounds: Sequence[tuple[float, float]],
) -> tuple[Array, Array]:
    """(linear coefficients, exponents) of the law whose columns are a function of the exponents.

    Given the exponents the law is linear: the best point of a grid of exponents, with its coefficients by non-negative
    least squares, is where the robust fit of all of them begins.
    """
    grid = np.stack(np.meshgrid(*starts, indexing="ij"), -1).reshape(-1, len(starts))
    first, residual = zip(*(nnls(columns(e) / error[:, None], loss / error) for e in grid), strict=True)
    best = int(np.argmin(residual))
    count = len(first[best])
    typical = float(np.mean(loss))

    def misfit(parameters: Array) -> Array:
        return (columns(parameters[count:]) @ (parameters[:count] * typical) - loss) / error

    low, high = zip(*([(0.0, np.inf)] * count + list(bounds)), strict=True)
    start = np.clip([*(first[best] / typical), *grid[best]], np.array(low) + 1e-9, np.minimum(high, 1e9))
    found = least_squares(misfit, start, bounds=(low, high), loss="soft_l1", x_scale="jac", max_nfev=300).x
    return found[:count] * typical, found[count:]


def _at_ends(parameters: Mapping[str, float], exponents: Sequence[str], typical: float) -> list[str]:
    """Exponents at 0 or at `MOST`; floor and scales at 0, next to `typical` losses."""
    return [
        name
        for name, value in parameters.items()
        if (not EDGE < value < MOST - EDGE if name in exponents else value < EDGE * typical)
    ]


def _middle(values: Array) -> float:
    """Their geometric mean: scale and exponent are least entangled there."""
    return float(np.exp(np.mean(np.log(values))))


def _require(values: Array, least: int, what: str) -> None:
    different = len(np.unique(values))
    if different < least:
        raise TooFewError(f"{different} different {what}: at least {least} are needed.")
