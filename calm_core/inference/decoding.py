"""From latents to tokens, decoding no more of the draws than an answer needs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.inference.temperature import occurrences
from calm_core.model.output_layer import log_probability, most_probable

UNDECODED = -1


class DocumentEnd(NamedTuple):
    """The tokens that end a document, and the pad that follows them in their chunk."""

    tokens: tuple[int, ...]
    pad: int

    def pad_after(self, tokens: Tensor) -> Tensor:
        """Tokens `[..., T]` with pad after the first end of a document: chunks that end the same way become equal."""
        end = torch.stack([tokens == token for token in self.tokens]).any(0).long()
        return tokens.masked_fill(end.cumsum(-1) > end, self.pad)


def decode_given(
    autoencoder: Autoencoder, latents: Tensor, known: Sequence[int], end: DocumentEnd
) -> tuple[Tensor, Tensor]:
    """The chunks `[N, K]` of latents `[N, l]` whose first tokens are known, and the log-probability `[N]` of those.

    The log-probability of the known tokens at a latent, float64, is the weight of that latent given them.
    """
    hidden, embedding = autoencoder.decode_chunk(latents), autoencoder.embedding.weight
    log_weights = torch.zeros(len(latents), dtype=torch.float64, device=latents.device)
    for position, token in enumerate(known):
        features = autoencoder.decode_positions(hidden, slice(position, position + 1))
        log_weights += log_probability(features.squeeze(1), embedding, token)
    rest = autoencoder.decode_positions(hidden, slice(len(known), autoencoder.k))
    found = most_probable(rest.flatten(0, 1), embedding).view(len(latents), -1)
    first = found.new_tensor(known, dtype=found.dtype).expand(len(latents), -1)
    return torch.cat([first, end.pad_after(found)], 1), log_weights


@dataclass(frozen=True)
class DrawnTokens:
    """N draws of one chunk for each of R rows; a token is decoded, into `tokens`, when it is first needed.

    Attributes:
        autoencoder: whose latents were drawn; None where the head draws tokens.
        hidden: the decoder's hidden states of the draws `[R, N, hidden]`; without an autoencoder, the tokens.
        tokens: `[R, N, K]` int64, `UNDECODED` where none was needed; pad follows the end of a document.
        end: what ends a document.
    """

    autoencoder: Autoencoder | None
    hidden: Tensor
    tokens: Tensor
    end: DocumentEnd

    @classmethod
    def of(cls, autoencoder: Autoencoder | None, drawn: Tensor, end: DocumentEnd) -> "DrawnTokens":
        """From latents `[R, N, l]` of the autoencoder or, without one, tokens `[R, N, K]`."""
        if autoencoder is None:
            return cls(None, drawn, drawn, end)
        tokens = torch.full((*drawn.shape[:-1], autoencoder.k), UNDECODED, device=drawn.device)
        return cls(autoencoder, autoencoder.decode_chunk(drawn), tokens, end)

    def rows(self, rows: Tensor) -> "DrawnTokens":
        """The draws of the rows `[R']` alone."""
        return replace(self, tokens=self.tokens[rows], hidden=self.hidden[rows])

    def followed_by(self, more: "DrawnTokens") -> "DrawnTokens":
        """These draws of each row and after them `more` of the same rows."""
        tokens, hidden = torch.cat([self.tokens, more.tokens], 1), torch.cat([self.hidden, more.hidden], 1)
        return replace(self, tokens=tokens, hidden=hidden)

    def decode(self, which: Tensor, stop: int | None = None) -> None:
        """Make sure that the first `stop` tokens (all without it) of the draws `which` `[R, N]` bool are decoded."""
        undecoded = self.tokens[..., :stop] == UNDECODED
        missing = which & undecoded.any(-1)
        if not missing.any():
            return
        tokens, new = self.tokens[missing][:, :stop], undecoded[missing]
        start = int(new.int().argmax(1).min())  # the tokens before it are decoded in every draw
        features = self.autoencoder.decode_positions(self.hidden[missing], slice(start, tokens.shape[1]))
        found = most_probable(features.flatten(0, 1), self.autoencoder.embedding.weight)
        tokens[:, start:] = torch.where(new[:, start:], found.view(len(tokens), -1), tokens[:, start:])
        self.tokens[missing, :stop] = self.end.pad_after(tokens)

    def agree(self, sets: Tensor) -> Tensor:
        """Which sets of n draws, `[R, T, n]` of their numbers, hold the same chunk n times: `[R, T]` bool.

        Sets that differ in their first token are decoded no further. The others are few: decoding the rest of their
        tokens in one pass is cheaper than a pass for each token.
        """
        k = self.tokens.shape[-1]
        equal = torch.ones(sets.shape[:2], dtype=torch.bool, device=sets.device)
        for start, stop in ((0, 1), (1, k)) if k > 1 else ((0, 1),):
            rows, which = equal.nonzero(as_tuple=True)
            wanted = torch.zeros_like(self.tokens[..., 0], dtype=torch.bool)
            wanted[rows.unsqueeze(1), sets[rows, which]] = True
            self.decode(wanted, stop)
            tokens = self.tokens[rows.unsqueeze(1), sets[rows, which], start:stop]  # [sets still equal, n, tokens]
            equal[rows, which] = (tokens == tokens[:, :1]).flatten(1).all(-1)
        return equal

    def shared_by(self, level: int, rows: Tensor) -> Tensor:
        """The draws `[R, N]` bool, of the rows `[R]` bool, whose whole chunk at least `level` draws have in common.

        A draw whose first tokens fewer than `level` draws have in common is decoded no further.
        """
        kept = rows.unsqueeze(-1).expand(self.tokens.shape[:2])
        for stop in range(1, self.tokens.shape[-1] + 1):
            self.decode(kept, stop)
            kept = kept & (occurrences(self.tokens[..., :stop]) >= level)
        return kept
