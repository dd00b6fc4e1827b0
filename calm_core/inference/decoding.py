"""From latents to tokens, decoding no more of the draws than an answer takes."""

import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.autoencoder.output_layer import log_probability, most_probable
from calm_core.inference.temperature import occurrences

UNDECODED = -1


class DrawnTokens:
    """The tokens of N draws of one chunk, for each of R rows, decoded where and when they are asked for.

    What follows an eos inside a chunk is pad: draws that end alike are equal.

    Attributes:
        tokens: `[R, N, K]` int64, `UNDECODED` where nobody has asked.
    """

    def __init__(self, autoencoder: Autoencoder | None, drawn: Tensor, eos: int, pad: int) -> None:
        """`drawn`: latents `[R, N, l]` of the autoencoder; without one, tokens `[R, N, K]`."""
        self._autoencoder, self._eos, self._pad = autoencoder, eos, pad
        if autoencoder is None:
            self.tokens = drawn
            return
        self._hidden = autoencoder.decode_chunk(drawn)  # [R, N, hidden]
        self.tokens = torch.full((*drawn.shape[:-1], autoencoder.k), UNDECODED, device=drawn.device)

    def keep(self, rows: Tensor) -> None:
        """Keep the draws of the rows `[R']` alone."""
        self.tokens = self.tokens[rows]
        if self._autoencoder is not None:
            self._hidden = self._hidden[rows]

    def append(self, more: "DrawnTokens") -> None:
        """Put more draws of every row behind those that are there."""
        self.tokens = torch.cat([self.tokens, more.tokens], 1)
        if self._autoencoder is not None:
            self._hidden = torch.cat([self._hidden, more._hidden], 1)

    def fix(self, known: list[int]) -> Tensor:
        """Set the first tokens of every draw; the decoder's log-probability `[R, N]` of them all."""
        total = torch.zeros(self.tokens.shape[:2], dtype=torch.float64, device=self.tokens.device)
        for position, token in enumerate(known):
            features = self._autoencoder.decode_positions(self._hidden, slice(position, position + 1))
            total += log_probability(features.flatten(0, 2), self._autoencoder.embedding.weight, token).view_as(total)
            self.tokens[..., position] = token
        return total

    def decode(self, which: Tensor, start: int = 0, stop: int | None = None) -> None:
        """Decode the tokens from `start` up to `stop` of the draws `which` `[R, N]` bool; earlier ones are decoded."""
        stop = self.tokens.shape[-1] if stop is None else stop
        missing = which & (self.tokens[..., start:stop] == UNDECODED).any(-1)
        if not missing.any():
            return
        features = self._autoencoder.decode_positions(self._hidden[missing], slice(start, stop))
        found = most_probable(features.flatten(0, 1), self._autoencoder.embedding.weight).view(-1, stop - start)
        tokens = self.tokens[missing]
        new = tokens[:, start:stop] == UNDECODED
        tokens[:, start:stop][new] = found[new]
        ends = (tokens[:, :stop] == self._eos).long()
        after = (ends.cumsum(-1) > ends)[:, start:]
        tokens[:, start:stop][new & after] = self._pad
        self.tokens[missing] = tokens

    def agree(self, sets: Tensor) -> Tensor:
        """Which sets of draws, `[R, T, n]` of their numbers, hold n times the same chunk, `[R, T]` bool.

        Sets that differ in their first token are decoded no further. The others are few: all the rest of their tokens
        in one pass is cheaper than a pass for each.
        """
        k = self.tokens.shape[-1]
        equal = torch.ones(sets.shape[:2], dtype=torch.bool, device=sets.device)
        for start, stop in ((0, 1), (1, k)) if k > 1 else ((0, 1),):
            rows, which = equal.nonzero(as_tuple=True)
            wanted = torch.zeros_like(self.tokens[..., 0], dtype=torch.bool)
            wanted[rows.unsqueeze(1), sets[rows, which]] = True
            self.decode(wanted, start, stop)
            tokens = self.tokens[rows.unsqueeze(1), sets[rows, which], start:stop]  # [sets that are equal, n, tokens]
            equal[rows, which] = (tokens == tokens[:, :1]).flatten(1).all(-1)
        return equal

    def agreeing(self, level: int, rows: Tensor) -> Tensor:
        """The draws `[R, N]` bool, of the rows `[R]` bool, whose whole chunk at least `level` draws share.

        A draw whose first tokens fewer than `level` draws share is decoded no further.
        """
        kept = rows.unsqueeze(-1).expand(self.tokens.shape[:2])
        for stop in range(1, self.tokens.shape[-1] + 1):
            self.decode(kept, stop - 1, stop)
            kept = kept & (occurrences(self.tokens[..., :stop]) >= level)
        return kept
