"""Curves of a run as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from calm_core.io import replacing

MODEL, BASELINE, HELD_OUT = "tab:blue", "tab:gray", "tab:orange"

Records = Sequence[Mapping[str, Any]]


def plot_loss(train: Records, evaluations: Records, title: str, path: Path) -> None:
    """The training loss over steps and, where evaluations know it, the held-out loss with two standard errors."""
    figure, axes = _figure(title, "step", "loss")
    axes.plot(*_columns(train, "loss"), color=MODEL, label="training")
    if any("loss" in record for record in evaluations):
        _with_errors(axes, evaluations, "loss", HELD_OUT, "held-out documents")
        axes.legend(frameon=False)
    _save(figure, path)


def plot_brier(evaluations: Records, path: Path) -> None:
    """Brier-1 and, for chunks of several tokens, Brier-2 on held-out documents over steps, and the unigram baseline.

    The band is two standard errors wide to each side.
    """
    shown = [n for n in (1, 2) if f"brier_{n}" in evaluations[-1]]
    figure = Figure(figsize=(5 * len(shown), 4), layout="constrained")
    for n, axes in zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
        style(axes, f"Brier-{n} on held-out documents", "step", "")
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        _with_errors(axes, evaluations, f"brier_{n}", MODEL, "CALM")
        axes.axhline(evaluations[-1][f"unigram_brier_{n}"], color=BASELINE, linestyle="--", label="unigram")
        axes.legend(frameon=False)
    _save(figure, path)


def plot_noise_curve(evaluation: Mapping[str, Any], path: Path) -> None:
    """Share of tokens that an autoencoder rebuilds under noise, over its standard deviation."""
    figure, axes = _figure(
        "Tokens rebuilt under noise, held-out documents", "standard deviation of the noise", "share of tokens"
    )
    sigmas, accuracies = zip(*evaluation["noise_curve"], strict=True)
    axes.plot(sigmas, accuracies, color=MODEL, marker="o")
    axes.axvline(evaluation["mean_sigma"], color=BASELINE, linestyle="--", label="mean sigma of the posterior")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.legend(frameon=False)
    _save(figure, path)


def plot_correlation(points: Records, r: float | None, path: Path) -> None:
    """BrierLM over cross-entropy, plain and on a logarithmic scale, where it is significant; a colour for each width.

    The bars are two standard errors long to each side.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, scale in zip(figure.subplots(1, 2), ("linear", "log"), strict=True):
        title = "logarithmic scale" if scale == "log" else "BrierLM" if r is None else f"BrierLM: r = {r:.3f}"
        style(axes, title, "held-out cross-entropy (nats a token)", "")
        axes.set_yscale(scale)
        for width in dict.fromkeys(point["width"] for point in points):
            own = [point for point in points if point["width"] == width and point["brier_lm"] is not None]
            x, y = ([point[name] for point in own] for name in ("cross_entropy", "brier_lm"))
            errors = [2 * point["brier_lm_error"] for point in own]
            axes.errorbar(x, y, errors, fmt="o", markersize=4, capsize=2, label=f"width {width}")
        axes.legend(frameon=False)
    _save(figure, path)


def _figure(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    style(axes, title, xlabel, ylabel)
    return figure, axes


def style(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Give axes their title, their labels and the look of all our plots."""
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def _with_errors(axes: Axes, records: Records, name: str, color: str, label: str) -> None:
    """A line with a band of two standard errors where they are known."""
    steps, values = _columns(records, name)
    errors = [2 * (record.get(f"{name}_error") or 0.0) for record in records if record.get(name) is not None]
    axes.plot(steps, values, color=color, marker="o", markersize=4, label=label)
    low, high = zip(*((v - e, v + e) for v, e in zip(values, errors, strict=True)), strict=True) if values else ((), ())
    axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)


def _columns(records: Records, name: str) -> tuple[list[int], list[float]]:
    known = [record for record in records if record.get(name) is not None]
    return [record["step"] for record in known], [record[name] for record in known]


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
