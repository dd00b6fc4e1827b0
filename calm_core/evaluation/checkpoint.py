"""The full evaluation of a checkpoint: all held-out windows, baselines, and diagnostics of its conditioning."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from calm_core.config.experiment import EvaluationConfig
from calm_core.data.dataset import Windows, read_batch
from calm_core.data.store import Store
from calm_core.evaluation.brier import MAX_TOKENS
from calm_core.evaluation.ngram import BigramModel, bigram_brier_terms
from calm_core.evaluation.scores import (
    HeldOut,
    ScoredBatch,
    at_places,
    baseline,
    branching_cache,
    chunks_to_draw,
    clustered,
    scored_batch,
    scores,
    summarize,
)
from calm_core.inference.load_model import Loaded
from calm_core.model.cache import BranchingCache
from calm_core.model.calm import CalmModel
from calm_core.model.noise import stream_seed
from calm_core.progress import Progress

BASELINES = [
    f"{of}_brier_{n}{e}" for of in ("bigram", "unigram") for n in range(1, MAX_TOKENS + 1) for e in ("", "_error")
]

BIGRAM_CHUNKS = 1 << 22  # of the training split that the bigram baseline is counted on: all of a small corpus


@torch.no_grad()
def evaluate_checkpoint(
    loaded: Loaded, train: Store | None, held_out: Store, seed: int, config: EvaluationConfig
) -> dict[str, Any]:
    """Score a model on `config.windows` windows of a store (0: all), evenly spread over it.

    Beside what an evaluation in training has: the bigram baseline, and the two diagnostics of `conditioning`. The name
    of the measure says context and alignment of the scored positions: scores under other names are not comparable.
    The baselines are those of the tokens in `train`, and None without.
    """
    windows = Windows(held_out, loaded.positions)
    count = min(config.windows or len(windows), len(windows))
    chosen = np.linspace(0, len(windows) - 1, count).astype(np.int64)
    counts, bigram = (None, None) if train is None else (train.token_counts(), _bigram_model(train))
    subject = HeldOut(windows, loaded.autoencoder, counts, seed, config)
    device, parts = next(loaded.model.parameters()).device, []
    with Progress("evaluating", count, "windows") as progress:
        for some in np.array_split(chosen, range(config.micro_batch, count, config.micro_batch)):
            batch, cache = read_batch(windows, some, some), branching_cache(loaded.shape.k)
            hidden = loaded.model.hidden(batch.inputs(device), cache)
            scored = scored_batch(loaded.model, hidden, batch, subject)
            if cache is not None:
                roll_out(loaded.model, scored, cache)
            found = {**scores(scored), **conditioning(scored)}
            if bigram is not None:
                previous = batch.tokens[:, scored.places, -1].T  # [P, B]
                found |= baseline("bigram", bigram_brier_terms(bigram, previous, scored.truth.cpu()))
            parts.append(clustered(found, scored))
            progress.advance(len(some))
    return {"windows": count, **subject.description(), **dict.fromkeys(BASELINES), **summarize(parts)}


def roll_out(model: CalmModel, scored: ScoredBatch, cache: BranchingCache) -> None:
    """Advance the draws of windows, whose hidden states are in the cache, to four tokens."""
    cache.branch(scored.held_out.branches(ranks=1).to(scored.hidden.device))
    for _ in range(1, chunks_to_draw(model.shape.k)):
        scored.draws.advance(model.hidden(scored.draws.said, cache))


def conditioning(scored: ScoredBatch) -> dict[str, Tensor]:
    """Two diagnostics of how the head uses its hidden state, at the scored places, `[P, B]` each.

    `loss_shuffled` is the loss with the hidden states of all windows and positions exchanged among each other: a head
    that listens to them loses much. `spread_samples` is the mean distance of two samples, `spread_posterior` that of
    two draws of the true chunk's posterior: the samples of an undecided model lie farther apart. A head that reads
    tokens has no spread.
    """
    seed = stream_seed(scored.held_out.seed, "evaluation/shuffle", int(scored.batch.samples[0]))
    flat = scored.hidden.flatten(0, 1)
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed)).to(flat.device)
    shuffled = scored.model.head.loss(flat[order].view_as(scored.hidden), scored.target, scored.noise).loss
    result = {"loss_shuffled": at_places(shuffled, scored)}
    if scored.target.mean is not None:
        latents = scored.draws.latents
        mean, std = (x[scored.places].unsqueeze(2) for x in (scored.target.mean, scored.target.log_std.exp()))
        draws = scored.noise.normal("evaluation/posterior", len(latents), *latents.shape[2:])
        result["spread_samples"], result["spread_posterior"] = _spread(latents), _spread(mean + std * draws)
    return result


def _bigram_model(train: Store) -> BigramModel:
    tokens = train.read(0, min(len(train), BIGRAM_CHUNKS), ("tokens",))["tokens"]
    return BigramModel(torch.from_numpy(tokens.reshape(-1).astype(np.int64)), train.vocab_size)


def _spread(points: Tensor) -> Tensor:
    """The mean distance `[P, B]` between two of N points `[P, B, N, l]`."""
    count = points.shape[2]
    return torch.cdist(points.float(), points.float()).sum((-1, -2)) / (count * (count - 1))
