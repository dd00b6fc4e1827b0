"""From latents to tokens, decoding no more of the draws than an answer takes."""

import torch
from torch import Tensor

from calm_core.autoencoder import Autoencoder
from calm_core.inference.output_layer import OutputLayer
from calm_core.temperature import occurrences

UNDECODED = -1


class Decoder:
    """An autoencoder's decoder, prepared for many draws."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder, self.output = autoencoder, OutputLayer(autoencoder.embedding.weight)


class DrawnTokens:
    """The tokens of N draws of one chunk, for each of R rows, decoded where and when they are asked for.

    What follows an eos inside a chunk is pad: draws that end alike are equal.

    Attributes:
        tokens: `[R, N, K]` int64, `UNDECODED` where nobody has asked.
    """

    def __init__(self, decoder: Decoder | None, drawn: Tensor, eos: int, pad: int) -> None:
        """`drawn`: latents `[R, N, l]` of the decoder's autoencoder; without one, tokens `[R, N, K]`."""
        self._decoder, self._eos, self._pad = decoder, eos, pad
        if decoder is None:
            self.tokens = drawn
            return
        self._hidden = decoder.autoencoder.decode_chunk(drawn)  # [R, N, hidden]
        self.tokens = torch.full((*drawn.shape[:-1], decoder.autoencoder.k), UNDECODED, device=drawn.device)

    def fix(self, known: list[int]) -> Tensor:
        """Set the first tokens of every draw; the decoder's log-probability `[R, N]` of them all."""
        total = torch.zeros(self.tokens.shape[:2], dtype=torch.float64, device=self.tokens.device)
        for position, token in enumerate(known):
            features = self._decoder.autoencoder.decode_position(self._hidden.flatten(0, 1), position)
            total += self._decoder.output.log_probability(features, token).view_as(total)
            self.tokens[..., position] = token
        return total

    def decode(self, which: Tensor, position: int) -> None:
        """Decode one token of the draws `which` `[R, N]` bool; their earlier tokens are decoded."""
        column = self.tokens[..., position]
        missing = which & (column == UNDECODED)
        ended = (self.tokens[..., :position] == self._eos).any(-1)
        column[missing & ended] = self._pad
        missing &= ~ended
        if missing.any():
            features = self._decoder.autoencoder.decode_position(self._hidden[missing], position)
            column[missing] = self._decoder.output.most_probable(features)

    def decode_whole(self, which: Tensor) -> None:
        """Decode every token of the draws `which` `[R, N]` bool."""
        for position in range(self.tokens.shape[-1]):
            self.decode(which, position)

    def agreeing(self, level: int, rows: Tensor) -> Tensor:
        """The draws `[R, N]` bool, of the rows `[R]` bool, whose whole chunk at least `level` draws share.

        A draw whose first tokens fewer than `level` draws share is decoded no further.
        """
        kept = rows.unsqueeze(-1).expand(self.tokens.shape[:2])
        for position in range(self.tokens.shape[-1]):
            self.decode(kept, position)
            kept = kept & (occurrences(self.tokens[..., : position + 1]) >= level)
        return kept
