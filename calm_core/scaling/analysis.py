"""The laws of a study: over compute, jointly over size, data and K, isoFLOP minima, the best model for a budget."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from calm_core.config.scaling_config import ScalingConfig
from calm_core.scaling.laws import (
    Array,
    JointLaw,
    PowerLaw,
    TooFewError,
    draw_losses,
    fit_joint,
    fit_power_law,
    interval,
)
from calm_core.scaling.points import BASELINE, families, flops_per_token, model_size, shape_of
from calm_core.scaling.results import Row

MAX_DEPTH = 256  # of the models that a prediction chooses from

BEST = {"cross_entropy": 0.0, "brier_lm": 100.0}  # the perfect score of a measure; 1 for Brier-n


@dataclass(frozen=True)
class Losses:
    """The rows that have a measure, as arrays `[n]`: its loss, the standard error, and where it was measured."""

    loss: Array
    error: Array
    flops: Array
    size: Array
    tokens: Array
    k: Array
    budget: Array
    model: list[str]

    def at(self, rows: Array) -> "Losses":
        """These rows, in this order."""
        arrays = {
            name: getattr(self, name)[rows] for name in ("loss", "error", "flops", "size", "tokens", "k", "budget")
        }
        return Losses(**arrays, model=[self.model[row] for row in rows])


def losses(rows: Iterable[Row], measure: str) -> Losses:
    """A measure as a loss: 1 - Brier-n, 100 - BrierLM, or the cross-entropy itself.

    Rows without the measure are skipped (BrierLM where it is not significant); a negative Brier-n is kept as measured.
    """
    best = BEST.get(measure, 1.0)
    sign = 1.0 if measure == "cross_entropy" else -1.0
    known = [row for row in rows if row[measure] is not None and row[f"{measure}_error"]]

    def column(name: str) -> Array:
        return np.array([row[name] for row in known], float)

    return Losses(
        best + sign * column(measure),
        column(f"{measure}_error"),
        column("flops"),
        column("size"),
        column("tokens"),
        column("k"),
        column("budget").astype(int),
        [row["model"] for row in known],
    )


def of_measure(loss: Array, measure: str) -> Array:
    """The measure at this loss: the inverse of `losses`."""
    return loss if measure == "cross_entropy" else BEST.get(measure, 1.0) - loss


def best_of_budgets(data: Losses) -> Losses:
    """The best model of each budget, smallest budget first, after averaging each model over its seeds."""
    groups: dict[tuple[int, float, float], list[int]] = defaultdict(list)
    for row, key in enumerate(zip(data.budget.tolist(), data.k.tolist(), data.size.tolist(), strict=True)):
        groups[key].append(row)
    best: dict[int, tuple[float, float, int]] = {}
    for (budget, *_), rows in groups.items():
        mean = float(data.loss[rows].mean())
        if budget not in best or mean < best[budget][0]:
            best[budget] = mean, float(np.sqrt(np.square(data.error[rows]).sum()) / len(rows)), rows[0]
    chosen = [best[budget] for budget in sorted(best)]
    loss, error = (np.array([one[i] for one in chosen], float) for i in (0, 1))
    return replace(data.at(np.array([row for *_, row in chosen], int)), loss=loss, error=error)


def analyse(config: ScalingConfig, rows: list[Row]) -> dict[str, Any]:
    """All laws of each measure; where the rows cannot determine one, a sentence that says what is missing."""
    return {measure: _of_measure(config, rows, measure) for measure in config.fit.measures}


def _of_measure(config: ScalingConfig, rows: list[Row], measure: str) -> dict[str, Any]:
    by_family = {f: losses((row for row in rows if row["family"] == f), measure) for f in families(config)}
    calm = losses((row for row in rows if row["family"] != BASELINE), measure)
    # The baseline has another kind of head, so it gets its own law.
    groups = {"CALM": (calm, [f for f in families(config) if f != BASELINE])}
    if config.grid.baseline:
        groups["AR"] = (by_family[BASELINE], [BASELINE])
    return {
        "compute": {family: _attempt(partial(_compute_law, config, data)) for family, data in by_family.items()},
        "isoflop": {family: _attempt(partial(_isoflop, config, data)) for family, data in by_family.items()},
        "joint": {name: _attempt(partial(_joint_law, config, *group)) for name, group in groups.items()},
    }


def _attempt(fit: Callable[[], Any]) -> dict[str, Any]:
    try:
        return fit()
    except TooFewError as missing:
        return {"missing": str(missing)}


def law_curve(law: dict[str, Any], measure: str, flops_of_points: Sequence[float]) -> tuple[Array, Array] | None:
    """A law over compute from `analyse`, over the range of the points: FLOPs and measure, `[50]` each."""
    if "missing" in law or not flops_of_points:
        return None
    parameters = {name: found["value"] for name, found in law["parameters"].items()}
    compute = np.geomspace(min(flops_of_points), max(flops_of_points), 50)
    return compute, of_measure(PowerLaw(**parameters, **law["references"])(compute), measure)


def _compute_law(config: ScalingConfig, data: Losses) -> dict[str, Any]:
    """Loss of the best model of each budget against compute."""

    def fit(of: Losses, near: PowerLaw | None = None) -> PowerLaw:
        return fit_power_law(of.flops, of.loss, of.error, near)

    best = best_of_budgets(data)
    law = fit(best)
    return _described(config, law, _resampled(config, law, best, (best.flops,), fit)) | {
        "points": len(best.model),
        "held_out": _held_out(best, fit, lambda law, of: law(of.flops)),
    }


def _joint_law(config: ScalingConfig, data: Losses, of: list[str]) -> dict[str, Any]:
    """Loss against N, D and K, and the best model that it predicts for each budget."""

    def fit(of: Losses, near: JointLaw | None = None) -> JointLaw:
        return fit_joint(of.size, of.tokens, of.k, of.loss, of.error, near)

    law = fit(data)
    draws = _resampled(config, law, data, (data.size, data.tokens, data.k), fit)
    budgets = config.fit.predict or [10 * float(data.flops.max())]
    held_out = _held_out(data, fit, lambda law, of: law(of.size, of.tokens, of.k))
    return _described(config, law, draws) | {
        "points": len(data.model),
        "held_out": held_out,
        "predictions": [best_model(config, law, draws, of, budget) | {"held_out": held_out} for budget in budgets],
    }


def _resampled(
    config: ScalingConfig, law: Any, data: Losses, at: tuple[Array, ...], fit: Callable[[Losses, Any], Any]
) -> list[Any]:
    """The laws of losses as they might have been, at the same points."""
    drawn = draw_losses(law(*at), law.gradient(*at), data.loss, data.error, data.model, config.fit.draws)
    return [fit(replace(data, loss=loss), law) for loss in drawn]


def _described(config: ScalingConfig, law: PowerLaw | JointLaw, draws: list[Any]) -> dict[str, Any]:
    """Parameters with their intervals, the scatter, and which parameters the points do not determine."""
    parameters = {
        name: {
            "value": value,
            "interval": interval([draw.parameters[name] for draw in draws], config.fit.confidence),
        }
        for name, value in law.parameters.items()
    }
    references = {name: value for name, value in vars(law).items() if name.endswith("reference")}
    return {
        "parameters": parameters,
        "references": references,
        "scatter": law.scatter,
        "undetermined": law.undetermined,
    }


def _held_out(
    data: Losses, fit: Callable[[Losses], Any], predict: Callable[[Any, Losses], Array]
) -> dict[str, float] | None:
    """The mean absolute error at the largest budget of a law fitted without it, and that in standard errors."""
    last = data.budget == data.budget.max()
    if last.all():
        return None
    try:
        law = fit(data.at(np.flatnonzero(~last)))
    except TooFewError:
        return None
    unseen = data.at(np.flatnonzero(last))
    missed = predict(law, unseen) - unseen.loss
    return {"error": float(np.abs(missed).mean()), "in_standard_errors": float(np.abs(missed / unseen.error).mean())}


def _isoflop(config: ScalingConfig, data: Losses) -> dict[str, Any]:
    """The size of least loss at each budget, by a parabola in log N; one scatter about all parabolas."""
    if config.grid.budget != "flops":
        raise TooFewError("the budgets are tokens (grid.budget): models of a budget differ in compute.")
    budgets = [b for b in np.unique(data.budget) if len(np.unique(data.size[data.budget == b])) >= 3]
    if not budgets:
        raise TooFewError("no budget has 3 sizes: isoFLOP curves need at least 3.")
    at = data.at(np.flatnonzero(np.isin(data.budget, budgets)))
    parabolas = _Parabolas.through(at, budgets)
    found = parabolas.minima(at.loss[None])[0]
    drawn = np.full((1, len(budgets)), np.nan)
    if len(at.loss) > parabolas.design.shape[1]:  # otherwise the parabolas go through all points and show no scatter
        fitted = parabolas.design @ (parabolas.solve @ at.loss)
        losses = draw_losses(fitted, parabolas.design, at.loss, at.error, at.model, config.fit.draws)
        drawn = parabolas.minima(losses)
    minima = [
        {
            "flops": float(at.flops[at.budget == budget].mean()),
            "size": None if np.isnan(size) else float(size),
            "interval": _interval_of_minimum(sizes, config.fit.confidence),
        }
        for budget, size, sizes in zip(budgets, found, drawn.T, strict=True)
    ]
    known = [(m["flops"], m["size"]) for m in minima if m["size"] is not None]
    growth = float(np.polyfit(*np.log(np.array(known)).T, 1)[0]) if len(known) >= 2 else None
    return {"minima": minima, "size_exponent": growth}


def _interval_of_minimum(sizes: Array, confidence: float) -> tuple[float, float] | None:
    """The interval of the drawn minima; None where too many draws have their minimum outside the sizes (NaN)."""
    inside = sizes[~np.isnan(sizes)]
    return interval(inside, confidence) if len(inside) >= confidence * len(sizes) else None


@dataclass(frozen=True)
class _Parabolas:
    """A parabola in log N for each budget, fitted by weighted least squares.

    Attributes:
        design: of the linear model, `[n, 3 b]` for b budgets.
        solve: from losses `[n]` to coefficients `[3 b]`.
        ends: log of the smallest and the largest size of each budget, `[b, 2]`, about `centre`.
        centre: mean of log N.
    """

    design: Array
    solve: Array
    ends: Array
    centre: float

    @classmethod
    def through(cls, at: Losses, budgets: Sequence[int]) -> "_Parabolas":
        """The model of these points."""
        centre = float(np.log(at.size).mean())
        log_size = np.log(at.size) - centre
        design, ends = np.zeros((len(at.loss), 3 * len(budgets))), []
        for number, budget in enumerate(budgets):
            rows = at.budget == budget
            design[rows, 3 * number : 3 * number + 3] = np.vander(log_size[rows], 3)
            ends.append((log_size[rows].min(), log_size[rows].max()))
        return cls(design, np.linalg.pinv(design / at.error[:, None]) / at.error, np.array(ends), centre)

    def minima(self, losses: Array) -> Array:
        """The size of least loss `[draws, b]` of losses `[draws, n]`; NaN where it is outside the sizes."""
        curvature, slope, _ = np.moveaxis((losses @ self.solve.T).reshape(len(losses), -1, 3), -1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            lowest = -slope / (2 * curvature)
        inside = (curvature > 0) & (self.ends[:, 0] <= lowest) & (lowest <= self.ends[:, 1])
        return np.where(inside, np.exp(lowest.clip(*self.ends.T) + self.centre), np.nan)


def best_model(
    config: ScalingConfig, law: JointLaw, draws: list[JointLaw], of: list[str], budget: float
) -> dict[str, Any]:
    """The family and depth of least predicted loss for `budget` training FLOPs, with its size, tokens and loss.

    `interval` is of that model's loss, `size_interval` of the sizes that the resampled laws choose. `edge` says that
    the model is the smallest or the largest considered, so that the law has no minimum within them.
    """
    depths = _depths()
    candidates = [
        (family, depth, *_size_and_tokens(config, family, depth, budget)) for family in of for depth in depths
    ]
    size, tokens = (np.array([c[i] for c in candidates], float) for i in (2, 3))
    k = np.array([shape_of(config, c[0], c[1]).k for c in candidates], float)
    predicted = law(size, tokens, k)
    best = int(np.argmin(predicted))
    family, depth, *_ = candidates[best]
    spread = [float(draw(size[best], tokens[best], k[best])) for draw in draws]
    choices = [int(np.argmin(draw(size, tokens, k))) for draw in draws]
    families_chosen = [candidates[choice][0] for choice in choices]
    return {
        "flops": budget,
        "family": family,
        "depth": depth,
        "size": int(size[best]),
        "tokens": int(tokens[best]),
        "loss": float(predicted[best]),
        "interval": interval(spread, config.fit.confidence),
        "size_interval": interval([size[choice] for choice in choices], config.fit.confidence),
        "edge": depth in (depths[0], depths[-1]),
        "families_of_resamplings": {f: families_chosen.count(f) / len(draws) for f in of},
    }


def _size_and_tokens(config: ScalingConfig, family: str, depth: int, budget: float) -> tuple[int, float]:
    shape = shape_of(config, family, depth)
    return model_size(shape), budget / flops_per_token(shape, config.grid.context // shape.k)


def _depths() -> list[int]:
    return sorted({round(depth) for depth in np.geomspace(1, MAX_DEPTH, 60)})
