"""The scores of micro-batches put together: means over documents with their standard errors, by name."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from calm_core.evaluation.brier import MAX_TOKENS
from calm_core.evaluation.clustered import BrierAccumulator, ClusteredMean, brier_lm, interval_factor
from calm_core.evaluation.held_out import ScoredPositions
from calm_core.evaluation.scores import ReadBatch, tokens_of
from calm_core.model.layers import own_positions

BLOCKS_PER_WINDOW = 8  # half of them are scored

ClusteredScores = tuple[tuple[str, ...], tuple[Tensor, Tensor, Tensor]]
"""Names of the scores, and the state of a `BrierAccumulator` over them: what ranks exchange."""


def clustered(scores: dict[str, Tensor], read: ReadBatch, scored: ScoredPositions) -> ClusteredScores:
    """Scores `[P', B]` summed by the document that each target chunk begins in, and by short blocks of positions."""
    windows, config = read.held_out.windows, read.model.config
    text = read.text(scored)
    counted = torch.stack([text[..., tokens_of(name) - 1] for name in scores], -1)
    documents = torch.from_numpy(windows.document_ids(read.batch.samples)).T[scored.positions + 1]
    block = scored.offsets * BLOCKS_PER_WINDOW // (windows.positions * scored.k)
    blocks = block.unsqueeze(1) + torch.from_numpy(read.batch.samples) * BLOCKS_PER_WINDOW
    values = torch.stack([score.cpu().double() for score in scores.values()], -1)
    own = own_positions(scored.counted, config)
    documents, counted, blocks = (own_positions(x, config)[own].flatten(0, 1) for x in (documents, counted, blocks))
    accumulator = BrierAccumulator(len(scores))
    accumulator.add(values[own].flatten(0, 1), documents, counted, blocks)
    return tuple(scores), accumulator.state()


def summarize(parts: Iterable[ClusteredScores]) -> dict[str, Any]:
    """Each score's mean under its name and its standard error, clustered by document, under `name_error`; BrierLM.

    `brier_lm` is None with a `brier_lm_reason` unless Brier-1..4 are all significant. A single document is divided into
    blocks of positions; an error is None where there is a single block, too. `standard_errors` says what they rest on,
    and how many of them a 95 % interval goes to either side. Of the variance of a scored position's Brier-n,
    `variance_within_n` is due to the draws and falls with their number, `variance_between_n` to the position and falls
    with the number of positions alone.
    """
    parts = list(parts)
    names = parts[0][0]
    total = BrierAccumulator(len(names))
    for _, state in parts:
        total.merge(state)
    result = total.result()
    errors = [None if math.isnan(error) else error for error in result.standard_error.tolist()]
    named: dict[str, Any] = {}
    for name, mean, error in zip(names, result.mean.tolist(), errors, strict=True):
        named[name], named[f"{name}_error"] = mean, error
    _split_variances(named, result.positions)
    own = [index for index, name in enumerate(names) if name.startswith("brier_")]
    lm = brier_lm(ClusteredMean(result.mean[own], result.covariance[own][:, own], result.positions, result.clusters))
    named |= {"brier_lm": lm.value, "brier_lm_error": lm.standard_error, "brier_lm_reason": lm.reason}
    factor = interval_factor(result.clusters) if result.clusters > 1 else None
    resting_on = {"clusters": result.clusters, "of": result.unit, "interval_factor": factor}
    return named | {
        "scored_positions": result.positions,
        "documents": result.documents,
        "standard_errors": resting_on,
    }


def _split_variances(named: dict[str, Any], positions: int) -> None:
    """Replace the mean squares of Brier-n by the variance that the positions account for."""
    for n in (n for n in range(1, MAX_TOKENS + 1) if f"square_{n}" in named):
        del named[f"square_{n}_error"], named[f"variance_within_{n}_error"]
        variance = (named.pop(f"square_{n}") - named[f"brier_{n}"] ** 2) * positions / max(positions - 1, 1)
        named[f"variance_between_{n}"] = variance - named[f"variance_within_{n}"]
