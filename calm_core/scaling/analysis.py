"""The laws of a study: over compute, jointly over size, data and K, isoFLOP minima, the best model for a budget."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from calm_core import flops
from calm_core.scaling.config import ScalingConfig
from calm_core.scaling.laws import (
    Array,
    JointLaw,
    PowerLaw,
    TooFewError,
    bootstrap,
    fit_joint,
    fit_power_law,
    interval,
)
from calm_core.scaling.points import BASELINE, families, model_size, shape_of
from calm_core.scaling.results import Row

DEEPEST = 256  # the ladder's rungs that a prediction looks at
FEWEST_DRAWS = 15  # resamplings below which there is no interval


@dataclass(frozen=True)
class Losses:
    """The rows that have a measure, as arrays `[n]`: what is lost of it, its error, and where it was measured."""

    loss: Array
    error: Array
    flops: Array
    size: Array
    tokens: Array
    k: Array
    budget: Array
    model: list[str]

    def at(self, rows: Array) -> "Losses":
        """Some of the rows, in this order."""
        arrays = {
            name: getattr(self, name)[rows] for name in ("loss", "error", "flops", "size", "tokens", "k", "budget")
        }
        return Losses(**arrays, model=[self.model[row] for row in rows])


def losses(rows: Iterable[Row], measure: str) -> Losses:
    """What is lost of a measure: 1 - Brier-n, 100 - BrierLM, cross-entropy as it is.

    BrierLM is there only where it is significant; Brier-n is taken as measured, never clamped.
    """
    best = {"cross_entropy": 0.0, "brier_lm": 100.0}.get(measure, 1.0)
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


def frontier(data: Losses) -> Array:
    """Indices of the rows that no row of at most their compute beats."""
    order = np.lexsort((data.loss, data.flops))
    kept, best = [], np.inf
    for row in order:
        if data.loss[row] < best:
            best = data.loss[row]
            kept.append(row)
    return np.array(kept, int)


def analyse(config: ScalingConfig, rows: list[Row]) -> dict[str, Any]:
    """All laws that the rows can carry, by measure; where they cannot, the sentence that says what is missing."""
    return {measure: _of_measure(config, rows, measure) for measure in config.fit.measures}


def _of_measure(config: ScalingConfig, rows: list[Row], measure: str) -> dict[str, Any]:
    by_family = {f: losses((row for row in rows if row["family"] == f), measure) for f in families(config)}
    calm = losses((row for row in rows if row["family"] != BASELINE), measure)
    # The baseline has another kind of head: its law is its own.
    groups = {"CALM": (calm, [f for f in families(config) if f != BASELINE])}
    if config.grid.baseline:
        groups["AR"] = (by_family[BASELINE], [BASELINE])
    return {
        "compute": {family: _attempt(partial(_compute_law, config, data)) for family, data in by_family.items()},
        "isoflop": {family: _attempt(partial(_isoflop, data)) for family, data in by_family.items()},
        "joint": {name: _attempt(partial(_joint_law, config, *group)) for name, group in groups.items()},
    }


def _attempt(fit: Callable[[], Any]) -> dict[str, Any]:
    try:
        return fit()
    except TooFewError as missing:
        return {"missing": str(missing)}


def _compute_law(config: ScalingConfig, data: Losses) -> dict[str, Any]:
    """Loss of the best models against compute."""

    def fit(chosen: Losses, near: PowerLaw | None = None) -> PowerLaw:
        best = chosen.at(frontier(chosen))
        return fit_power_law(best.flops, best.loss, best.error, near)

    def predict(law: PowerLaw, of: Losses) -> Array:
        return law(of.flops)

    law = fit(data)
    draws = bootstrap(lambda rows: fit(data.at(rows), law), data.model, config.fit.draws)
    return _named(law, draws, config.fit.confidence) | {
        "points": len(frontier(data)),
        "held_out": _held_out(data, fit, predict, best_only=True),
    }


def _joint_law(config: ScalingConfig, data: Losses, of: list[str]) -> dict[str, Any]:
    """Loss against N, D and K, and the best model that it foretells for budgets."""

    def fit(chosen: Losses, near: JointLaw | None = None) -> JointLaw:
        return fit_joint(chosen.size, chosen.tokens, chosen.k, chosen.loss, chosen.error, near)

    def predict(law: JointLaw, of: Losses) -> Array:
        return law(of.size, of.tokens, of.k)

    law = fit(data)
    draws = bootstrap(lambda rows: fit(data.at(rows), law), data.model, config.fit.draws)
    budgets = config.fit.predict or [10 * float(data.flops.max())]
    held_out = _held_out(data, fit, predict)
    return _named(law, draws, config.fit.confidence) | {
        "points": len(data.model),
        "held_out": held_out,
        "predictions": [best_model(config, law, draws, of, budget) | {"held_out": held_out} for budget in budgets],
    }


def _named(law: PowerLaw | JointLaw, draws: list[Any], confidence: float) -> dict[str, Any]:
    """Parameters with their intervals; an interval is None where too few resamplings determined the form."""
    enough = len(draws) >= FEWEST_DRAWS
    parameters = {
        name: {
            "value": value,
            "interval": interval([draw.parameters[name] for draw in draws], confidence) if enough else None,
        }
        for name, value in law.parameters.items()
    }
    references = {name: value for name, value in vars(law).items() if name.endswith("reference")}
    return {"parameters": parameters, "references": references, "resamplings": len(draws)}


def _held_out(
    data: Losses, fit: Callable[[Losses], Any], predict: Callable[[Any, Losses], Array], best_only: bool = False
) -> dict[str, float] | None:
    """How far a law fitted without the largest budget misses there, on average and in standard errors."""
    last = data.budget == data.budget.max()
    if last.all():
        return None
    try:
        law = fit(data.at(np.flatnonzero(~last)))
    except TooFewError:
        return None
    unseen = data.at(np.flatnonzero(last))
    if best_only:
        unseen = unseen.at(frontier(unseen))
    missed = predict(law, unseen) - unseen.loss
    return {"error": float(np.abs(missed).mean()), "in_standard_errors": float(np.abs(missed / unseen.error).mean())}


def _isoflop(data: Losses) -> dict[str, Any]:
    """The size with the least loss at each budget: the minimum of a parabola in log N through the losses."""
    minima = []
    for budget in np.unique(data.budget):
        at = data.at(np.flatnonzero(data.budget == budget))
        if len(np.unique(at.size)) < 3:
            continue
        curvature, slope, _ = np.polyfit(np.log(at.size), at.loss, 2, w=1 / at.error)
        inside = curvature > 0 and np.log(at.size.min()) <= -slope / (2 * curvature) <= np.log(at.size.max())
        best = float(np.exp(-slope / (2 * curvature))) if inside else None
        minima.append({"flops": float(at.flops.mean()), "size": best})
    if not minima:
        raise TooFewError("no budget has 3 sizes: isoFLOP curves need at least 3.")
    known = [(m["flops"], m["size"]) for m in minima if m["size"] is not None]
    growth = float(np.polyfit(*np.log(np.array(known)).T, 1)[0]) if len(known) >= 2 else None
    return {"minima": minima, "size_exponent": growth}


def best_model(
    config: ScalingConfig, law: JointLaw, draws: list[JointLaw], of: list[str], budget: float
) -> dict[str, Any]:
    """The family and rung of least loss that `budget` training FLOPs can pay, with its tokens and the loss foretold."""
    candidates = [
        (family, depth, *_size_and_tokens(config, family, depth, budget)) for family in of for depth in _depths()
    ]
    size, tokens = (np.array([c[i] for c in candidates], float) for i in (2, 3))
    k = np.array([shape_of(config, c[0], c[1]).k for c in candidates], float)
    foretold = law(size, tokens, k)
    best = int(np.argmin(foretold))
    family, depth, *_ = candidates[best]
    spread = [float(draw(size[best], tokens[best], k[best])) for draw in draws]
    choices = [candidates[int(np.argmin(draw(size, tokens, k)))][0] for draw in draws]
    return {
        "flops": budget,
        "family": family,
        "depth": depth,
        "size": int(size[best]),
        "tokens": int(tokens[best]),
        "loss": float(foretold[best]),
        "interval": interval(spread, config.fit.confidence) if len(spread) >= FEWEST_DRAWS else None,
        "families_of_resamplings": {f: choices.count(f) / len(choices) for f in of} if choices else {},
    }


def _size_and_tokens(config: ScalingConfig, family: str, depth: int, budget: float) -> tuple[int, float]:
    shape = shape_of(config, family, depth)
    return model_size(shape), budget / flops.paper_training(shape, 1, config.grid.context // shape.k)


def _depths() -> list[int]:
    return sorted({round(depth) for depth in np.geomspace(1, DEEPEST, 60)})
