"""Evaluations as text tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from calm_core.evaluation.brier import MAX_TOKENS, half_interval


def checkpoint_table(result: Mapping[str, Any]) -> str:
    """The evaluation of a checkpoint: Brier-n beside the baselines, then the rest, one a line."""
    depths = _depths(result)
    rows = [
        [f"Brier-{n}", *(_percent(result, f"{model}brier_{n}") for model in ("", "bigram_", "unigram_"))]
        for n in depths
    ]
    within, between = (f"{result[f'variance_{part}_1']:.2e}" for part in ("within", "between"))
    spread = [
        f"spread of the {of}: {_value(result, f'spread_{name}')}"
        for of, name in (("draws", "samples"), ("posterior", "posterior"))
        if f"spread_{name}" in result
    ]
    return "\n".join(
        [
            _extent(result),
            *table(["score", "model", "bigram", "unigram"], rows),
            f"{result['measure']}: {_brier_lm(result)}",
            *_reason(result),
            *_no_baselines(result),
            *_weighted(result),
            *_paper(result),
            *_text(result),
            f"variance of Brier-1 at a scored position: {within} from the draws, {between} from the position",
            f"collision rate of the next token: {_percent(result, 'collision_1')}",
            f"loss: {_value(result, 'loss')}; with shuffled hidden states: {_value(result, 'loss_shuffled')}",
            *spread,
            _interval(result),
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
            *(
                line
                for of in (_weighted, _paper)
                for result in results
                for line in of(result, f"{result['checkpoint']}: ")
            ),
            *_text(first),
            *_no_baselines(first),
            _interval(first),
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
            f"cross-entropy of a posterior sample: {result['cross_entropy']:.4f} nats a token",
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
        f"{result['windows']} windows with {result['places_per_window']} scored positions each, "
        f"{result['scored_positions']:,} in {result['documents']} documents; {result['samples']} draws at each"
        + (f", rolled out over {result['rollout_chunks']} chunks" if result["rollout_chunks"] > 1 else "")
    )


def _weighted(result: Mapping[str, Any], whose: str = "") -> list[str]:
    """How the scored positions inside chunks were predicted, if there are any."""
    known = " or ".join(str(count) for count in result["known_tokens"] if count)
    if not known:
        return []
    worth = f"the draws at a position are worth {result['effective_draws']:.1f} equal ones on average"
    return [f"{whose}positions inside a chunk: draws weighted by its first {known} tokens; {worth}"]


def _interval(result: Mapping[str, Any]) -> str:
    """What the "±" means."""
    errors = result["standard_errors"]
    if errors["interval_factor"] is None:
        return "no standard errors: all scored positions are of one block of one document"
    clusters = errors["clusters"]
    unit = "documents" if errors["of"] == "documents" else "blocks of positions of one document"
    return f"±: half of a 95 % interval, by Student's t with {clusters - 1} degrees of freedom ({clusters} {unit})"


def _paper(result: Mapping[str, Any], whose: str = "") -> list[str]:
    """BrierLM by the paper's protocol, if it was asked for."""
    if "paper" not in result:
        return []
    paper = result["paper"]
    reason = f" ({paper['brier_lm_reason']})" if paper["brier_lm"] is None else ""
    extent = f"all {paper['scored_positions']:,} positions, {paper['samples']} draws at each"
    return [f"{whose}{paper['measure']}: {_brier_lm(paper)}{reason}; {extent}"]


def _text(result: Mapping[str, Any]) -> list[str]:
    """How a text was made into tokens, if one was given."""
    if "text" not in result:
        return []
    text = result["text"]
    eos = "end with eos" if text["eos"] else "have no eos at the end"
    source = "assumed, imported weights do not say it" if text["assumed"] else "as the run's own data"
    return [f"documents of the text {eos}, data.packing={text['packing']}: {source}"]


def _depths(result: Mapping[str, Any]) -> list[int]:
    """The n of each Brier-n that was scored."""
    return [n for n in range(1, MAX_TOKENS + 1) if f"brier_{n}" in result]


def _brier_lm(result: Mapping[str, Any]) -> str:
    return "none" if result["brier_lm"] is None else _with_interval(result, "brier_lm", ".3f")


def _reason(result: Mapping[str, Any]) -> list[str]:
    """Why there is no BrierLM, if there is none."""
    return [f"no BrierLM: {result['brier_lm_reason']}"] if result["brier_lm"] is None else []


def _no_baselines(result: Mapping[str, Any]) -> list[str]:
    """Why there are no baselines, if there are none."""
    return [f"no baselines: {result['baselines_reason']}"] if result["unigram_brier_1"] is None else []


def _percent(result: Mapping[str, Any], name: str) -> str:
    return "-" if result[name] is None else _with_interval(result, name, ".3%")


def _value(result: Mapping[str, Any], name: str) -> str:
    return _with_interval(result, name, ".4f")


def _with_interval(result: Mapping[str, Any], name: str, form: str) -> str:
    """A score, and half of its 95 % interval where there is one."""
    half = half_interval(result, name)
    return f"{result[name]:{form}}" + (f" ± {half:{form}}" if half is not None else "")
