"""Draws of the next tokens at the scored positions of a micro-batch, rolled out where a chunk is too short."""

from dataclasses import dataclass

import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.autoencoder.output_layer import log_probability
from calm_core.evaluation.brier import MAX_TOKENS
from calm_core.evaluation.held_out import ScoredPositions
from calm_core.model.calm import CalmModel
from calm_core.model.layers import gathered_positions, own_positions
from calm_core.model.noise import SampleNoise


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
