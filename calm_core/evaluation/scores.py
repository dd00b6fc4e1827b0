"""What is drawn and scored at each scored position: Brier-1 to Brier-4, baselines, the loss, diagnostics of the head.

Scores have names and are `[P', B]`, one number for each of this rank's scored positions of B windows. A name that ends
in `_n` counts where the next n tokens are text, any other name where the first is. A new score is added here.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
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
from calm_core.evaluation.held_out import HeldOut, ScoredPositions
from calm_core.evaluation.ngram import bigram_brier_terms, unigram_brier_terms
from calm_core.model.calm import CalmModel
from calm_core.model.heads import Target
from calm_core.model.layers import gathered_positions, own_positions
from calm_core.model.noise import SampleNoise, stream_seed
from calm_core.model.output_layer import log_probability

BASELINES = [
    *(
        f"{name}_brier_{n}{e}"
        for name in ("bigram", "unigram")
        for n in range(1, MAX_TOKENS + 1)
        for e in ("", "_error")
    ),
    *(f"bigram_brier_lm{part}" for part in ("", "_error", "_reason")),
]


@dataclass(frozen=True)
class Draws:
    """N draws of the next chunks at each of this rank's P' scored positions of B windows.

    All draws of all positions are rolled out together, as branches of the windows in a cache. The first K tokens of a
    roll-out are what one chunk would have been: all Brier-n of a model rest on the same draws.

    Attributes:
        latents: of the first chunk `[P', B, N, l]`; its token where the head samples tokens.
        tokens: of all chunks so far `[P', B, N, T]`; the known ones are those of the text.
        known: how many of the first tokens are known at each position `[P']`.
        log_weights: the decoder's log-probability of the known tokens at each latent `[P', B, N]` float64; None where
            no position has any.
        log_probabilities: of each token given all before it `[P', B, N, T]`; None where the head has no likelihood.
    """

    latents: Tensor
    tokens: Tensor
    known: Tensor
    log_weights: Tensor | None = None
    log_probabilities: Tensor | None = None

    @property
    def predicted(self) -> Tensor:
        """The four predicted tokens of each draw, `[P', B, N, 4]`."""
        index = self.known.view(-1, 1, 1, 1) + torch.arange(MAX_TOKENS, device=self.tokens.device)
        return self.tokens.gather(-1, index.expand(*self.tokens.shape[:-1], -1))

    def last_chunks(self, model: CalmModel) -> Tensor:
        """The last chunk of every branch on all tensor-parallel ranks, `[B, P N, K]`: the model's next input."""
        branches = self.tokens[..., -model.shape.k :].transpose(1, 2).flatten(0, 1)  # [P' N, B, K]
        return gathered_positions(branches, model.config).transpose(0, 1)


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

    A head with likelihoods uses the estimate with far less noise, unless the protocol requires draws.
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

    The draws of a model that has learned little are farther apart; those of one that has collapsed, closer together.
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


def first_draws(
    model: CalmModel,
    autoencoder: Autoencoder | None,
    noise: SampleNoise,
    hidden: Tensor,
    scored: ScoredPositions,
    text: Tensor,
    n: int,
) -> Draws:
    """Draw the chunk that each scored position begins in.

    Where the position begins inside the chunk, the tokens before it are known: a draw has them, and weighs as much as
    the decoder's probability of them at its latent. As N grows, weighted draws follow the model's own distribution of
    the other tokens.

    Args:
        model: the last stage of the network.
        autoencoder: decodes latents; None where the head samples tokens.
        noise: the streams of the windows.
        hidden: the hidden states that predict the chunks, this rank's `[P', B, d]`.
        scored: the positions of all ranks, `[P]`.
        text: the true chunks at them, `[P, B, K]`.
        n: N, draws of each.
    """
    known = own_positions(scored.known, model.config).to(hidden.device)
    latents = model.head.sample(hidden, noise, n)
    if autoencoder is None:
        likely = _log_probabilities(model, hidden.repeat_interleave(n, 0), latents.squeeze(-1), n)
        return Draws(latents, latents, known, log_probabilities=likely)
    tokens = autoencoder.decode_tokens(latents)
    if not (scored.known > 0).any():
        return Draws(latents, tokens, known)
    text = own_positions(text, model.config)
    given = torch.arange(model.shape.k, device=hidden.device) < known.unsqueeze(1)  # [P', K]
    tokens = torch.where(given[:, None, None], text.unsqueeze(2), tokens)
    return Draws(latents, tokens, known, log_weights=_log_probability_of_known(autoencoder, latents, text, known))


def next_draws(
    model: CalmModel, autoencoder: Autoencoder | None, noise: SampleNoise, hidden: Tensor, draws: Draws
) -> Draws:
    """Draw one more chunk for each branch, from the hidden states `[P' N, B, d]` that `last_chunks` led to."""
    n, step = draws.tokens.shape[2], draws.tokens.shape[-1] // model.shape.k
    after = SampleNoise(noise.seed, noise.samples, noise.device, f"{noise.purpose}/step-{step}")
    drawn = model.head.sample(hidden, after, 1).squeeze(2)  # [P' N, B, l]
    tokens = drawn if autoencoder is None else autoencoder.decode_tokens(drawn)
    tokens = tokens.unflatten(0, (-1, n)).transpose(1, 2)
    likely = draws.log_probabilities
    if likely is not None:
        likely = torch.cat([likely, _log_probabilities(model, hidden, tokens.squeeze(-1), n)], -1)
    return Draws(draws.latents, torch.cat([draws.tokens, tokens], -1), draws.known, draws.log_weights, likely)


def _log_probabilities(model: CalmModel, hidden: Tensor, tokens: Tensor, n: int) -> Tensor:
    """log P `[P', B, N, 1]` of tokens `[P', B, N]` from the hidden states of their branches `[P' N, B, d]`."""
    branches = gathered_positions(tokens.transpose(1, 2).flatten(0, 1), model.config)
    likely = model.head.log_probabilities(hidden, branches)
    return likely.unflatten(0, (-1, n)).transpose(1, 2).unsqueeze(-1)


def _log_probability_of_known(autoencoder: Autoencoder, latents: Tensor, text: Tensor, known: Tensor) -> Tensor:
    """The decoder's log-probability `[P', B, N]` float64 of the known tokens of chunks `[P', B, K]` at the latents."""
    hidden = autoencoder.decode_chunk(latents)
    total = torch.zeros(latents.shape[:-1], dtype=torch.float64, device=latents.device)
    for index in range(int(known.max())):
        here = known > index
        features = autoencoder.decode_positions(hidden[here], slice(index, index + 1)).flatten(0, -2)
        tokens = text[here][..., index].unsqueeze(-1).expand(total[here].shape)
        found = log_probability(features, autoencoder.embedding.weight, tokens.flatten())
        total[here] += found.view(tokens.shape)
    return total
