"""Scores of one micro-batch of held-out windows, and their means over documents."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calm_core.autoencoder import Autoencoder
from calm_core.brier import BrierAccumulator, BrierTerms, ClusteredMean, brier_lm, brier_terms
from calm_core.data.windows import Windows
from calm_core.model.calm import CalmModel
from calm_core.model.heads.protocol import Target
from calm_core.model.sequence import own_positions
from calm_core.ngram import unigram_brier_terms
from calm_core.noise import SampleNoise
from calm_core.padding import text_tokens
from calm_core.training.chunk_batch import ChunkBatch
from calm_core.training.evaluation_config import EvaluationConfig

# Scored positions start at token offsets divisible by this, so that models of every K score the same places.
STRIDE = 8

ClusteredScores = tuple[tuple[str, ...], tuple[Tensor, Tensor, Tensor]]
"""Names of the scores, and the state of a `BrierAccumulator` over them: what ranks exchange."""


@dataclass(frozen=True)
class HeldOut:
    """What a model is scored on.

    Attributes:
        windows: of the held-out split.
        autoencoder: turns sampled latents into tokens; None where the head says tokens itself.
        counts: of each token in the training split `[V]`, for the unigram baseline.
        seed: of the evaluation's noise.
        config: how much of it.
    """

    windows: Windows
    autoencoder: Autoencoder | None
    counts: np.ndarray
    seed: int
    config: EvaluationConfig


class ScoredBatch(NamedTuple):
    """A micro-batch of held-out windows on its way to scores.

    Attributes:
        model: the network, of which this rank holds the last stage.
        held_out: what it is scored on.
        chosen: the windows `[B]`.
        hidden: hidden states of the rank's own positions `[S', B, d]`.
        target: the true next chunks `[S, B, ...]`.
        noise: the streams of these windows.
        latents: draws from the hidden states `[S', B, N, l]`, or tokens `[S', B, N, 1]`.
        rows: the scored ones among the rank's own positions `[P]`.
    """

    model: CalmModel
    held_out: HeldOut
    chosen: np.ndarray
    hidden: Tensor
    target: Target
    noise: SampleNoise
    latents: Tensor
    rows: Tensor

    @property
    def truth(self) -> Tensor:
        """The true next chunk at each scored position `[P, B, K]`."""
        return own_positions(self.target.tokens, self.model.config)[self.rows]


def scored_positions(positions: int, k: int) -> Tensor:
    """Positions p whose target chunk p + 1 has half the context before it and an offset divisible by `STRIDE`."""
    target = torch.arange(1, positions + 1)
    return ((target * k % STRIDE == 0) & (2 * target >= positions)).nonzero().flatten()


def scored_batch(model: CalmModel, hidden: Tensor, batch: ChunkBatch, held_out: HeldOut) -> ScoredBatch:
    """Draw N latents from the hidden states `[S', B, d]` of a micro-batch, whose samples are the windows themselves."""
    windows, device = held_out.windows, hidden.device
    noise = SampleNoise(held_out.seed, batch.samples, device, purpose="evaluation")
    latents = model.head.sample(hidden, noise, held_out.config.samples)
    scored = torch.zeros(windows.positions, dtype=torch.bool)
    scored[scored_positions(windows.positions, windows.store.k)] = True
    rows = own_positions(scored, model.config).nonzero().flatten()
    return ScoredBatch(model, held_out, batch.samples, hidden, batch.target(device), noise, latents, rows)


def scores(batch: ScoredBatch) -> dict[str, Tensor]:
    """Brier-1..4, collision rate, unigram baseline and loss of the head at the scored positions, `[P, B]` each."""
    held_out, rows = batch.held_out, batch.rows
    brier = brier_terms(_decode(held_out.autoencoder, batch.latents[rows]), batch.truth)
    unigram = unigram_brier_terms(torch.from_numpy(held_out.counts), batch.truth.cpu())
    loss = batch.model.head.loss(batch.hidden, batch.target, batch.noise).loss[rows]
    return {
        **numbered("brier", brier),
        "collision_1": brier.collision[..., 0],
        **numbered("unigram_brier", unigram),
        "loss": loss,
    }


def numbered(name: str, terms: BrierTerms) -> dict[str, Tensor]:
    """Brier-1, Brier-2, ... `[P, B]` by name."""
    return {f"{name}_{n}": score for n, score in enumerate(terms.score.unbind(-1), 1)}


def clustered(scores: dict[str, Tensor], batch: ScoredBatch) -> ClusteredScores:
    """Scores `[P, B]` summed by the document that each target chunk begins in.

    A score named `..._n` counts where the n-th token of the target is text, one without a number where the first is.
    """
    text = text_tokens(batch.truth.cpu(), batch.held_out.windows.store.padding)
    counted = torch.stack([text[..., _token_of(name)] for name in scores], -1)
    documents = torch.from_numpy(batch.held_out.windows.document_ids(batch.chosen))[:, 1:].T
    documents = own_positions(documents, batch.model.config)[batch.rows]
    values = torch.stack([score.cpu().double() for score in scores.values()], -1)
    accumulator = BrierAccumulator(len(scores))
    accumulator.add(values.flatten(0, 1), documents.flatten(), counted.flatten(0, 1))
    return tuple(scores), accumulator.state()


def _token_of(name: str) -> int:
    """The last token of the target that a score looks at, counted from 0."""
    number = name.rpartition("_")[2]
    return int(number) - 1 if number.isdigit() else 0


def summarize(parts: Iterable[ClusteredScores]) -> dict[str, Any]:
    """Each score's mean under its name and its standard error, clustered by document, under `name_error`; BrierLM.

    `brier_lm` is None with a `brier_lm_reason` unless Brier-1..4 are all significant; an error is None where a single
    document cannot tell.
    """
    parts = list(parts)
    names = parts[0][0]
    total = BrierAccumulator(len(names))
    for _, state in parts:
        total.merge(state)
    result = total.result()
    errors = [error if result.clusters > 1 else None for error in result.standard_error.tolist()]
    named: dict[str, Any] = {}
    for name, mean, error in zip(names, result.mean.tolist(), errors, strict=True):
        named[name], named[f"{name}_error"] = mean, error
    own = [index for index, name in enumerate(names) if name.startswith("brier_")]
    lm = brier_lm(ClusteredMean(result.mean[own], result.covariance[own][:, own], result.positions, result.clusters))
    named |= {"brier_lm": lm.value, "brier_lm_error": lm.standard_error, "brier_lm_reason": lm.reason}
    return named | {"scored_positions": result.positions, "documents": result.clusters}


def _decode(autoencoder: Autoencoder | None, latents: Tensor, at_once: int = 4096) -> Tensor:
    """Latents `[P, B, N, l]` -> tokens `[P, B, N, K]`; without an autoencoder they are tokens already."""
    if autoencoder is None:
        return latents
    tokens = [autoencoder.decode_tokens(part) for part in latents.flatten(0, 2).split(at_once)]
    return torch.cat(tokens).view(*latents.shape[:3], -1)
