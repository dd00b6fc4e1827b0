"""Evaluations as tables for a person."""

from collections.abc import Mapping, Sequence
from typing import Any

from calm_core.evaluation.brier import MAX_TOKENS


def checkpoint_table(result: Mapping[str, Any]) -> str:
    """The evaluation of a checkpoint: Brier-n beside the baselines, then the rest, one a line."""
    depths = _depths(result)
    rows = [
        [f"Brier-{n}", *(_percent(result, f"{model}brier_{n}") for model in ("", "bigram_", "unigram_"))]
        for n in depths
    ]
    within, between = (f"{result[f'variance_{part}_1']:.2e}" for part in ("within", "between"))
    spread = [
        f"spread of the {what}: {_value(result, f'spread_{what}')}"
        for what in ("samples", "posterior")
        if f"spread_{what}" in result
    ]
    return "\n".join(
        [
            _extent(result),
            *table(["score", "model", "bigram", "unigram"], rows),
            f"{result['measure']}: {_brier_lm(result)}",
            *_reason(result),
            *_no_baselines(result),
            f"variance of one place's Brier-1: {within} from the draws, {between} from the places",
            f"collision rate of the next token: {_percent(result, 'collision_1')}",
            f"loss: {_value(result, 'loss')}; with shuffled hidden states: {_value(result, 'loss_shuffled')}",
            *spread,
        ]
    )


def comparison_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Checkpoints scored under one context, one a line, and the baselines of the first that has them."""
    first = next((result for result in results if not _no_baselines(result)), results[0])
    depths = _depths(first)
    rows = [
        [
            result["checkpoint"],
            str(result["k"]),
            result["head"],
            *(_percent(result, f"brier_{n}") for n in depths),
            _brier_lm(result),
            _value(result, "loss"),
        ]
        for result in results
    ]
    for name in ("bigram", "unigram"):
        rows.append([name, "", "", *(_percent(first, f"{name}_brier_{n}") for n in depths), "", ""])
    reasons = [f"{result['checkpoint']}: {line}" for result in results for line in _reason(result)]
    strides = {result["measure"] for result in results}
    return "\n".join(
        [
            _extent(first),
            *table(["checkpoint", "K", "head", *(f"Brier-{n}" for n in depths), "BrierLM", "loss"], rows),
            f"BrierLM is {', '.join(sorted(strides))}; losses compare between checkpoints of one K and head alone",
            *reasons,
            *_no_baselines(first),
        ]
    )


def autoencoder_table(result: Mapping[str, Any]) -> str:
    """The evaluation of an autoencoder: tokens rebuilt, then the state of its latent dimensions."""
    sigma, kl = result["dimension_sigma"], result["kl"]
    by_position = "  ".join(f"{share:.3%}" for share in result["position_accuracy"])
    rows = [
        ["of the mean", f"{result['token_accuracy']:.3%}"],
        ["of a posterior sample", f"{result['token_accuracy_posterior']:.3%}"],
        *([f"at sigma {sigma:.1f}", f"{accuracy:.3%}"] for sigma, accuracy in result["noise_curve"]),
    ]
    return "\n".join(
        [
            f"{result['chunks']:,} chunks",
            *table(["tokens rebuilt", "share"], rows),
            f"by position in the chunk, of the mean: {by_position}",
            f"sigma: {result['mean_sigma']:.3f} on average, {min(sigma):.3f} to {max(sigma):.3f} by dimension",
            f"KL: {sum(kl):.1f} nats a chunk, {min(kl):.3f} to {max(kl):.3f} by dimension",
            f"dead dimensions: {result['dead_dimensions']} of {len(kl)}",
        ]
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in [head, *rows]
    ]


def _extent(result: Mapping[str, Any]) -> str:
    return (
        f"{result['windows']} windows with {result['places_per_window']} scored places each, "
        f"{result['scored_positions']:,} in {result['documents']} documents; {result['samples']} draws a place"
        + (f", rolled out over {result['rollout_chunks']} chunks" if result["rollout_chunks"] > 1 else "")
    )


def _depths(result: Mapping[str, Any]) -> list[int]:
    """The n of the Brier-n that were scored."""
    return [n for n in range(1, MAX_TOKENS + 1) if f"brier_{n}" in result]


def _brier_lm(result: Mapping[str, Any]) -> str:
    lm = result["brier_lm"]
    return "none" if lm is None else f"{lm:.3f} ± {result['brier_lm_error']:.3f}"


def _reason(result: Mapping[str, Any]) -> list[str]:
    """Why there is no BrierLM, if there is none."""
    return [f"no BrierLM: {result['brier_lm_reason']}"] if result["brier_lm"] is None else []


def _no_baselines(result: Mapping[str, Any]) -> list[str]:
    """Why there are no baselines, if there are none."""
    return [f"no baselines: {result['baselines_reason']}"] if result["unigram_brier_1"] is None else []


def _percent(result: Mapping[str, Any], name: str) -> str:
    if result[name] is None:
        return "-"
    error = result[f"{name}_error"]
    return f"{result[name]:.3%}" + (f" ± {error:.3%}" if error is not None else "")


def _value(result: Mapping[str, Any], name: str) -> str:
    error = result[f"{name}_error"]
    return f"{result[name]:.4f}" + (f" ± {error:.4f}" if error is not None else "")
