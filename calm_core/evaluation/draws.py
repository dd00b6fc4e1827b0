"""Draws of the next tokens at the scored places: of one chunk, or of several by rolling the model out."""

import torch
from torch import Tensor

from calm_core.autoencoder import Autoencoder
from calm_core.evaluation.places import chunks_to_draw
from calm_core.model.cache import BranchingCache
from calm_core.model.calm import CalmModel
from calm_core.model.sequence import gathered_positions
from calm_core.noise import SampleNoise


class Draws:
    """N draws of the next tokens at each of P places of B windows: one chunk, or as many as four tokens take.

    All draws of all places go on together, as branches of the windows in a cache. The first K tokens of a roll-out are
    what one chunk would have been: all Brier-n of a model rest on the same draws.

    Attributes:
        latents: of the first chunk `[P', B, N, l]` of this rank's P' places; its token where the head says tokens.
        said: the last chunk of every branch, `[B, P N, K]`: the model's next input.
    """

    def __init__(self, model: CalmModel, autoencoder: Autoencoder | None, noise: SampleNoise, hidden: Tensor, n: int):
        """Draw the first chunks from hidden states `[P', B, d]`; `autoencoder` is None where the head says tokens."""
        self._model, self._autoencoder, self._noise, self._samples = model, autoencoder, noise, n
        self._tokens: list[Tensor] = []  # [P' N, B, K] each
        self._log_probabilities: list[Tensor] = []
        self.latents = model.head.sample(hidden, noise, n)
        likely = model.shape.head.reads_tokens
        self._add(hidden.repeat_interleave(n, 0) if likely else hidden, self.latents.transpose(1, 2).flatten(0, 1))

    def advance(self, hidden: Tensor) -> None:
        """Draw another chunk for each branch from the hidden states `[P' N, B, d]` that `said` led to."""
        noise, step = self._noise, len(self._tokens)
        after = SampleNoise(noise.seed, noise.samples, noise.device, f"{noise.purpose}/step-{step}")
        self._add(hidden, self._model.head.sample(hidden, after, 1).squeeze(2))

    @property
    def tokens(self) -> Tensor:
        """`[P', B, N, T]`."""
        return self._by_place(torch.cat(self._tokens, -1))

    @property
    def log_probability(self) -> Tensor | None:
        """Of each token given all before it `[P', B, N, T]`; None where the head has no likelihood."""
        return self._by_place(torch.stack(self._log_probabilities, -1)) if self._log_probabilities else None

    def _add(self, hidden: Tensor, drawn: Tensor) -> None:
        tokens = drawn if self._autoencoder is None else self._autoencoder.decode_tokens(drawn)
        said = gathered_positions(tokens, self._model.config)
        if self._model.shape.head.reads_tokens:
            self._log_probabilities.append(self._model.head.log_probabilities(hidden, said.squeeze(-1)))
        self._tokens.append(tokens)
        self.said = said.transpose(0, 1)

    def _by_place(self, branches: Tensor) -> Tensor:
        """`[P' N, B, T]` -> `[P', B, N, T]`."""
        return branches.unflatten(0, (-1, self._samples)).transpose(1, 2)


def branching_cache(k: int) -> BranchingCache | None:
    """What the hidden states of windows are computed with for a roll-out; None where one chunk has four tokens."""
    return BranchingCache() if chunks_to_draw(k) > 1 else None
