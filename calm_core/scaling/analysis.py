"""The laws of a study: over compute, jointly over size, data and K, isoFLOP minima, the best model for a budget."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from calm_core.config.scaling_config import ScalingConfig
from calm_core.plan import flops
from calm_core.scaling.laws import Array, JointLaw, PowerLaw, TooFewError, bootstrap, fit_joint, fit_power_law, interval
from calm_core.scaling.points import BASELINE, families, model_size, shape_of
from calm_core.scaling.results import Row

DEEPEST = 256  # the ladder's rungs that a prediction looks at

BEST = {"cross_entropy": 0.0, "brier_lm": 100.0}  # of what a measure says; of Brier-n it is 1


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
    """The measure where this much is lost of it: the way back from `losses`."""
    return loss if measure == "cross_entropy" else BEST.get(measure, 1.0) - loss


def best_of_budgets(data: Losses) -> Losses:
    """The best model of each budget, the smallest first; the seeds of a model are averaged before."""
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
        "isoflop": {family: _attempt(partial(_isoflop, config, data)) for family, data in by_family.items()},
        "joint": {name: _attempt(partial(_joint_law, config, *group)) for name, group in groups.items()},
    }


def _attempt(fit: Callable[[], Any]) -> dict[str, Any]:
    try:
        return fit()
    except TooFewError as missing:
        return {"missing": str(missing)}


def law_curve(law: dict[str, Any], measure: str, flops_of_points: Sequence[float]) -> tuple[Array, Array] | None:
    """A law over compute, as `analyse` gives it, over the range of the points: FLOPs and measure, `[50]` each."""
    if "missing" in law or not flops_of_points:
        return None
    parameters = {name: found["value"] for name, found in law["parameters"].items()}
    compute = np.geomspace(min(flops_of_points), max(flops_of_points), 50)
    return compute, of_measure(PowerLaw(**parameters, **law["references"])(compute), measure)


def _compute_law(config: ScalingConfig, data: Losses) -> dict[str, Any]:
    """Loss of the best model of each budget against compute."""

    def fit(of: Losses, near: PowerLaw | None = None) -> PowerLaw:
        return fit_power_law(of.flops, of.loss, of.error, near)

    def predict(law: PowerLaw, of: Losses) -> Array:
        return law(of.flops)

    best = best_of_budgets(data)
    law = fit(best)
    return _named(config, law, _resampled(config, law, best, fit, predict)) | {
        "points": len(best.model),
        "held_out": _held_out(best, fit, predict),
    }


def _joint_law(config: ScalingConfig, data: Losses, of: list[str]) -> dict[str, Any]:
    """Loss against N, D and K, and the best model that it foretells for budgets."""

    def fit(of: Losses, near: JointLaw | None = None) -> JointLaw:
        return fit_joint(of.size, of.tokens, of.k, of.loss, of.error, near)

    def predict(law: JointLaw, of: Losses) -> Array:
        return law(of.size, of.tokens, of.k)

    law = fit(data)
    draws = _resampled(config, law, data, fit, predict)
    budgets = config.fit.predict or [10 * float(data.flops.max())]
    held_out = _held_out(data, fit, predict)
    return _named(config, law, draws) | {
        "points": len(data.model),
        "held_out": held_out,
        "predictions": [best_model(config, law, draws, of, budget) | {"held_out": held_out} for budget in budgets],
    }


def _resampled(
    config: ScalingConfig,
    law: Any,
    data: Losses,
    fit: Callable[[Losses, Any], Any],
    predict: Callable[[Any, Losses], Array],
) -> list[Any]:
    """Laws of the losses as they might have been."""

    def refit(loss: Array) -> Any:
        return fit(replace(data, loss=loss), law)

    return bootstrap(refit, predict(law, data), data.loss, data.error, data.model, config.fit.draws)


def _named(config: ScalingConfig, law: PowerLaw | JointLaw, draws: list[Any]) -> dict[str, Any]:
    """Parameters with their intervals, and which of them the points leave open."""
    parameters = {
        name: {
            "value": value,
            "interval": interval([draw.parameters[name] for draw in draws], config.fit.confidence),
        }
        for name, value in law.parameters.items()
    }
    references = {name: value for name, value in vars(law).items() if name.endswith("reference")}
    return {"parameters": parameters, "references": references, "undetermined": law.undetermined}


def _held_out(
    data: Losses, fit: Callable[[Losses], Any], predict: Callable[[Any, Losses], Array]
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
    missed = predict(law, unseen) - unseen.loss
    return {"error": float(np.abs(missed).mean()), "in_standard_errors": float(np.abs(missed / unseen.error).mean())}


def _isoflop(config: ScalingConfig, data: Losses) -> dict[str, Any]:
    """The size with the least loss at each budget, by a parabola in log N; intervals by losses drawn anew."""
    if config.grid.budget != "flops":
        raise TooFewError("the budgets are tokens (grid.budget): models of a budget differ in compute.")
    generator = np.random.default_rng(0)
    minima = []
    for budget in np.unique(data.budget):
        at = data.at(np.flatnonzero(data.budget == budget))
        if len(np.unique(at.size)) < 3:
            continue
        drawn = [
            _minimum(replace(at, loss=at.loss + generator.standard_normal(len(at.loss)) * at.error))
            for _ in range(config.fit.draws)
        ]
        inside = [size for size in drawn if size is not None]
        sure = len(inside) >= config.fit.confidence * len(drawn)
        minima.append(
            {
                "flops": float(at.flops.mean()),
                "size": _minimum(at),
                "interval": interval(inside, config.fit.confidence) if sure else None,
            }
        )
    if not minima:
        raise TooFewError("no budget has 3 sizes: isoFLOP curves need at least 3.")
    known = [(m["flops"], m["size"]) for m in minima if m["size"] is not None]
    growth = float(np.polyfit(*np.log(np.array(known)).T, 1)[0]) if len(known) >= 2 else None
    return {"minima": minima, "size_exponent": growth}


def _minimum(at: Losses) -> float | None:
    """Where a parabola in log N through the losses of one budget is least; None where that is outside the sizes."""
    curvature, slope, _ = np.polyfit(np.log(at.size), at.loss, 2, w=1 / at.error)
    if curvature <= 0 or not np.log(at.size.min()) <= -slope / (2 * curvature) <= np.log(at.size.max()):
        return None
    return float(np.exp(-slope / (2 * curvature)))


def best_model(
    config: ScalingConfig, law: JointLaw, draws: list[JointLaw], of: list[str], budget: float
) -> dict[str, Any]:
    """The family and rung of least loss that `budget` training FLOPs can pay, with its tokens and the loss foretold.

    `interval` is of that model's loss, `size_interval` of the size that the resampled laws choose. `edge` says that
    it is the smallest or largest rung looked at, where the law knows no best.
    """
    depths = _depths()
    candidates = [
        (family, depth, *_size_and_tokens(config, family, depth, budget)) for family in of for depth in depths
    ]
    size, tokens = (np.array([c[i] for c in candidates], float) for i in (2, 3))
    k = np.array([shape_of(config, c[0], c[1]).k for c in candidates], float)
    foretold = law(size, tokens, k)
    best = int(np.argmin(foretold))
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
        "loss": float(foretold[best]),
        "interval": interval(spread, config.fit.confidence),
        "size_interval": interval([size[choice] for choice in choices], config.fit.confidence),
        "edge": depth in (depths[0], depths[-1]),
        "families_of_resamplings": {f: families_chosen.count(f) / len(draws) for f in of},
    }


def _size_and_tokens(config: ScalingConfig, family: str, depth: int, budget: float) -> tuple[int, float]:
    shape = shape_of(config, family, depth)
    return model_size(shape), budget / flops.paper_training(shape, 1, config.grid.context // shape.k)


def _depths() -> list[int]:
    return sorted({round(depth) for depth in np.geomspace(1, DEEPEST, 60)})
