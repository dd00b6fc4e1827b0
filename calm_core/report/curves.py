"""The figures of a run and of its autoencoder as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calm_core.report.draw import draw
from calm_core.report.figure import GREY, Axis, Figure, Trace, curve, curve_with_band, half_interval

Records = Sequence[Mapping[str, Any]]

STEPS = Axis("step")


def plot_loss(train: Records, evaluations: Records, title: str, path: Path) -> None:
    """The training loss over steps and, where evaluations know it, the held-out loss with its 95 % interval."""
    traces = [
        curve(train, "loss", "training", color=0),
        curve_with_band(evaluations, "loss", "held-out documents", color=1),
    ]
    draw([Figure("loss", title, STEPS, [t for t in traces if t], Axis("loss"))], path)


def plot_brier(evaluations: Records, path: Path) -> None:
    """Brier-1 and, for chunks of several tokens, Brier-2 on held-out documents over steps, and the baselines.

    The band is the 95 % interval.
    """
    shown = [n for n in (1, 2) if f"brier_{n}" in evaluations[-1]]
    figures = []
    for n in shown:
        traces = [
            curve_with_band(evaluations, f"brier_{n}", "model", color=0),
            curve(evaluations, f"unigram_brier_{n}", "unigram", color=GREY, dashed=True),
            curve(evaluations, f"bigram_brier_{n}", "bigram", color=3, dashed=True),
        ]
        title = f"Brier-{n} on held-out documents"
        figures.append(Figure(f"brier-{n}", title, STEPS, [t for t in traces if t], brier_axis(n)))
    draw(figures, path, width=5)


def brier_axis(n: int) -> Axis:
    """The axis of Brier-n."""
    return Axis(f"Brier-{n}, per cent", percent=True)


def plot_noise_curve(evaluation: Mapping[str, Any], path: Path) -> None:
    """The fraction of tokens that an autoencoder reconstructs under noise, over its standard deviation."""
    sigmas, accuracies = zip(*evaluation["noise_curve"], strict=True)
    mean = evaluation["mean_sigma"]
    traces = [
        Trace("reconstructed", sigmas, accuracies, points=True),
        Trace("mean sigma of the posterior", [mean, mean], [0.0, 1.0], color=GREY, dashed=True),
    ]
    title, x = "Tokens reconstructed under noise, held-out documents", Axis("standard deviation of the noise")
    draw([Figure("noise", title, x, traces, Axis("tokens reconstructed", percent=True, least=0, most=1.02))], path)


def plot_correlation(points: Records, r: float | None, path: Path) -> None:
    """BrierLM over cross-entropy, plain and on a logarithmic scale, where it is significant; a colour for each width.

    The bars are 95 % intervals.
    """
    traces = []
    for width in dict.fromkeys(point["width"] for point in points):
        own = [point for point in points if point["width"] == width and point["brier_lm"] is not None]
        x, y = ([point[name] for point in own] for name in ("cross_entropy", "brier_lm"))
        traces.append(Trace(f"width {width}", x, y, [half_interval(point, "brier_lm") for point in own], line=False))
    title = "BrierLM" if r is None else f"BrierLM: r = {r:.3f}"
    entropy = Axis("held-out cross-entropy, nats per token")
    figures = [
        Figure("linear", title, entropy, traces, Axis("BrierLM")),
        Figure("log", "logarithmic scale", entropy, traces, Axis("BrierLM", log=10)),
    ]
    draw(figures, path, width=5)
