"""What is scored at each scored position: Brier-1 to Brier-4 with baselines, the loss, and diagnostics of the head.

Scores have names and are `[P', B]`, one number for each of this rank's scored positions of B windows. A name that ends
in `_n` counts where the next n tokens are text, any other name where the first is. A new score is added here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from calm_core.data.chunks import text_tokens
from calm_core.data.dataset import ChunkBatch
from calm_core.evaluation.brier import (
    MAX_TOKENS,
    BrierTerms,
    autoregressive_brier_terms,
    autoregressive_within_variance,
    brier_terms,
    effective_draws,
    weighted_brier_terms,
    weighted_within_variance,
    within_variance,
)
from calm_core.evaluation.draws import Draws
from calm_core.evaluation.held_out import HeldOut, ScoredPositions
from calm_core.evaluation.ngram import bigram_brier_terms, unigram_brier_terms
from calm_core.model.calm import CalmModel
from calm_core.model.heads.protocol import Target
from calm_core.model.layers import gathered_positions, own_positions
from calm_core.model.noise import SampleNoise, stream_seed

BASELINES = [
    f"{name}_brier_{n}{e}" for name in ("bigram", "unigram") for n in range(1, MAX_TOKENS + 1) for e in ("", "_error")
]


class ReadBatch(NamedTuple):
    """A micro-batch of held-out windows that the model has read.

    Attributes:
        model: the network, of which this rank holds the last stage.
        held_out: what it is scored on.
        batch: the windows.
        hidden: hidden states of the rank's own positions `[S', B, d]`.
        target: the true next chunks `[S, B, ...]`.
        noise: the streams of these windows.
    """

    model: CalmModel
    held_out: HeldOut
    batch: ChunkBatch
    hidden: Tensor
    target: Target
    noise: SampleNoise

    def at(self, values: Tensor, positions: Tensor) -> Tensor:
        """Values `[S', ...]` of this rank's own positions -> `[P', ...]` of its share of the positions `[P]`."""
        config = self.model.config
        return own_positions(gathered_positions(values, config)[positions], config)

    def tokens(self, first: Tensor, count: int) -> Tensor:
        """The tokens of each window from the offsets `first` `[P]` on, `[P, B, count]`, on the host."""
        return _tokens_from(self.batch.tokens, first, count)

    def text(self, scored: ScoredPositions) -> Tensor:
        """Whether the next n = 1..4 tokens at every scored position are text and no padding, `[P, B, 4]` bool."""
        text = text_tokens(self.batch.tokens, self.held_out.windows.store.padding)
        return _tokens_from(text, scored.offsets, MAX_TOKENS).cumprod(-1) > 0


def read(model: CalmModel, held_out: HeldOut, batch: ChunkBatch, hidden: Tensor) -> ReadBatch:
    """The batch and the hidden states `[S', B, d]` that the last stage has for it."""
    purpose = "evaluation" if held_out.protocol == "default" else f"evaluation/{held_out.protocol}"
    noise = SampleNoise(held_out.seed, batch.samples, hidden.device, purpose)
    return ReadBatch(model, held_out, batch, hidden, batch.target(hidden.device), noise)


def position_scores(read: ReadBatch) -> dict[str, Tensor]:
    """What needs no draws, `[S', B]` at all of this rank's positions: the loss of the head.

    With diagnostics also `loss_shuffled`, the loss with the hidden states of all windows and positions exchanged among
    each other: a head that uses them loses much.
    """
    head, hidden = read.model.head, read.hidden
    losses = {"loss": head.loss(hidden, read.target, read.noise).loss}
    if read.held_out.diagnostics:
        seed = stream_seed(read.held_out.seed, "evaluation/shuffle", int(read.batch.samples[0]))
        flat = hidden.flatten(0, 1)
        order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed)).to(flat.device)
        losses["loss_shuffled"] = head.loss(flat[order].view_as(hidden), read.target, read.noise).loss
    return losses


def draw_scores(read: ReadBatch, scored: ScoredPositions, draws: Draws) -> dict[str, Tensor]:
    """The scores of the draws at the scored positions, `[P', B]` each.

    Brier-n and, of each, its square and the variance that is due to the draws; the collision rate; the baselines; if
    the draws are weighted, how many equal ones they are worth; with diagnostics, the spread of the draws.
    """
    held_out, config = read.held_out, read.model.config
    truth = read.tokens(scored.offsets, MAX_TOKENS)
    brier, variance = _brier(read, scored, draws, own_positions(truth, config).to(read.hidden.device))
    found = {**_numbered("brier", brier.score), "collision_1": brier.collision[..., 0]}
    if held_out.protocol == "paper":
        return found
    found |= {**_numbered("square", brier.score.square()), **_numbered("variance_within", variance)}
    if draws.log_weights is not None:
        found["effective_draws"] = effective_draws(draws.log_weights)
    if held_out.counts is not None:
        unigram = unigram_brier_terms(torch.from_numpy(held_out.counts), own_positions(truth, config))
        found |= _numbered("unigram_brier", unigram.score)
    if held_out.bigram is not None:
        previous = own_positions(read.tokens(scored.offsets - 1, 1).squeeze(-1), config)
        bigram = bigram_brier_terms(held_out.bigram, previous, own_positions(truth, config))
        found |= _numbered("bigram_brier", bigram.score)
    if held_out.diagnostics and read.target.mean is not None:
        found |= _spreads(read, scored, draws)
    return found


def tokens_of(name: str) -> int:
    """How many of the next tokens must be text for a score of this name to count."""
    number = name.rpartition("_")[2]
    return int(number) if number.isdigit() else 1


def _brier(read: ReadBatch, scored: ScoredPositions, draws: Draws, truth: Tensor) -> tuple[BrierTerms, Tensor | None]:
    """Brier-1..4 `[P', B, 4]` and the variance that the draws account for, None under the paper's protocol.

    A head with likelihoods takes the form of far less noise, unless the protocol wants draws.
    """
    predicted = draws.predicted
    if read.held_out.protocol == "paper":
        if draws.log_weights is None:
            return brier_terms(predicted, truth), None
        return weighted_brier_terms(predicted, truth, draws.log_weights), None
    if draws.log_probabilities is not None:
        likely = draws.log_probabilities
        terms = autoregressive_brier_terms(_log_probability_of_truth(read, scored), likely)
        return terms, autoregressive_within_variance(likely)
    if draws.log_weights is not None:
        arguments = predicted, truth, draws.log_weights
        return weighted_brier_terms(*arguments), weighted_within_variance(*arguments)
    return brier_terms(predicted, truth), within_variance(predicted, truth)


def _log_probability_of_truth(read: ReadBatch, scored: ScoredPositions) -> Tensor:
    """log P of each true next token given all before it, by teacher forcing, `[P', B, 4]`."""
    truth = read.tokens(scored.offsets, MAX_TOKENS).to(read.hidden.device)
    return torch.stack(
        [
            read.model.head.log_probabilities(read.at(read.hidden, scored.positions + i), token)
            for i, token in enumerate(truth.unbind(-1))
        ],
        -1,
    )


def _spreads(read: ReadBatch, scored: ScoredPositions, draws: Draws) -> dict[str, Tensor]:
    """The mean distance of two draws, and that of two draws of the true chunk's posterior.

    The draws of a model that has learnt little lie farther apart; those of one that has collapsed, closer together.
    """
    config, latents = read.model.config, draws.latents
    mean, std = (
        own_positions(x[scored.positions], config).unsqueeze(2) for x in (read.target.mean, read.target.log_std.exp())
    )
    noise = read.noise.normal("evaluation/posterior", len(scored.offsets), *latents.shape[2:])
    return {
        "spread_samples": mean_distance(latents),
        "spread_posterior": mean_distance(mean + std * own_positions(noise, config)),
    }


def mean_distance(points: Tensor) -> Tensor:
    """The mean distance `[P, B]` between two different ones of N points `[P, B, N, l]`.

    By differences: above 25 points `torch.cdist` takes inner products by default, which cancel where points are close.
    """
    points, count = points.float(), points.shape[2]
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.sum((-1, -2)) / (count * (count - 1))


def _tokens_from(chunks: Tensor, first: Tensor, count: int) -> Tensor:
    """`count` values from the offsets `first` `[P]` on of each window of chunks `[B, S + 1, K]`: `[P, B, count]`."""
    return chunks.flatten(1)[:, first.unsqueeze(1) + torch.arange(count)].transpose(0, 1)


def _numbered(name: str, values: Tensor) -> dict[str, Tensor]:
    """Columns `[P, B]` of `[P, B, n]` by name."""
    return {f"{name}_{n}": column for n, column in enumerate(values.unbind(-1), 1)}
