"""The next chunk of each request: draws of the head, and which of them is taken."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from calm_core.inference.decoding import Decoder, DrawnTokens
from calm_core.inference.load import Loaded
from calm_core.inference.options import GenerationOptions
from calm_core.noise import SampleNoise, stream_seed
from calm_core.temperature import (
    CallLimitError,
    estimate_calls,
    inverse_parts,
    sample_batch,
    sample_exact,
    whole_inverse,
)

Allowed = Callable[[Tensor, Sequence[int]], Tensor]
"""`allowed(chunks, history)`: which of the chunks `[N, K]` may follow the tokens before them, `[N]` bool."""


@dataclass
class Context:
    """What one request's next chunk is drawn from.

    Attributes:
        seed: of its noise.
        tokens: all before the chunk.
        known: the first tokens of the chunk, fewer than K.
    """

    seed: int
    tokens: Sequence[int]
    known: list[int] = field(default_factory=list)


class Chunk(NamedTuple):
    """A chunk that was chosen.

    Attributes:
        tokens: K of them; pad follows an eos.
        draws: latents drawn for it.
        agreement: how many equal draws it rests on: below n the temperature 1/n was not reached.
        effective_samples: the draws its choice rests on by weight; None where no token of it was known.
    """

    tokens: list[int]
    draws: int
    agreement: int
    effective_samples: float | None = None


class ChunkSampler:
    """Draws the next chunk at a temperature; a pure function of (hidden state, position, context)."""

    def __init__(self, loaded: Loaded, options: GenerationOptions, allowed: Allowed | None = None) -> None:
        self._loaded, self._options, self._allowed = loaded, options, allowed
        self._decoder = Decoder(loaded.autoencoder) if loaded.autoencoder else None

    def next_chunks(self, hidden: Tensor, contexts: Sequence[Context], position: int) -> list[Chunk]:
        """The chunk at `position` for each of R contexts, from the hidden states `[1, R, d]` before it."""
        columns = [hidden[:, i : i + 1] for i in range(len(contexts))]
        if self._options.method == "exact":
            return [self._exact(column, c, position) for column, c in zip(columns, contexts, strict=True)]
        free = [i for i, c in enumerate(contexts) if not c.known and self._allowed is None]
        chosen = dict(zip(free, self._free(hidden[:, free], [contexts[i] for i in free], position), strict=True))
        return [
            chosen[i] if i in chosen else self._bound(column, contexts[i], position) for i, column in enumerate(columns)
        ]

    def expected_calls(self, hidden: Tensor, context: Context, position: int) -> float:
        """The mean number of draws that the exact method takes here, estimated from N draws; hidden `[1, 1, d]`."""
        tokens, log_weights = self._weighed(hidden, context, position, block=0)
        accepted = log_weights.exp().mean().item()
        if not accepted:
            return math.inf
        resampled = _resampled(tokens, log_weights, self._generator(context, position))
        return estimate_calls(resampled, self._options.temperature) / accepted

    def _free(self, hidden: Tensor, contexts: Sequence[Context], position: int) -> list[Chunk]:
        """Batch approximation with every draw as good as the next, for R contexts at once: hidden `[1, R, d]`.

        Equal in distribution to decoding all draws and `sample_batch` of them. Only draws that agree n times have a
        weight, so only they are decoded to the end; where there are none, n falls.
        """
        if not contexts:
            return []
        whole = whole_inverse(self._options.temperature)
        draws = self._options.samples if whole > 1 else 1  # at T = 1 any draw will do
        drawn = self._draw(hidden, contexts, position, draws)
        generators = [self._generator(context, position) for context in contexts]
        one = torch.stack([torch.randint(draws, (1,), generator=g) for g in generators]).to(hidden.device)
        agreement = torch.zeros(len(contexts), dtype=torch.int64, device=hidden.device)
        kept = torch.zeros(drawn.tokens.shape[:2], dtype=torch.bool, device=hidden.device)
        for level in range(min(whole, draws), 0, -1):
            rows = agreement == 0
            if level > 1:
                found = drawn.agreeing(level, rows)
            else:  # all differ: any one of them, and only that one is decoded
                found = (torch.arange(draws, device=hidden.device) == one) & rows.unsqueeze(-1)
                drawn.decode_whole(found)
            agreement[found.any(-1)] = level
            kept |= found
        return [
            Chunk(sample_batch(tokens[k], 1 / level, g).tokens.tolist(), draws, level)
            for tokens, k, level, g in zip(drawn.tokens.cpu(), kept.cpu(), agreement.tolist(), generators, strict=True)
        ]

    def _bound(self, hidden: Tensor, context: Context, position: int) -> Chunk:
        """Batch approximation under known tokens or a predicate, which weigh the draws. Hidden `[1, 1, d]`."""
        drawn = 0
        for tokens, log_weights in self._blocks(hidden, context, position):
            drawn += len(tokens)
            if log_weights.isfinite().any():
                break
        effective = 1 / log_weights.softmax(0).square().sum().item() if context.known else None
        generator = self._generator(context, position)
        kept = _resampled(tokens, log_weights, generator)
        chunk = sample_batch(kept, self._options.temperature, generator)
        return Chunk(chunk.tokens.tolist(), drawn, int(chunk.agreement), effective)

    def _exact(self, hidden: Tensor, context: Context, position: int) -> Chunk:
        """Exact temperature: a draw counts with the probability of the known tokens under it. Hidden `[1, 1, d]`."""
        options, generator, drawn = self._options, self._generator(context, position), 0

        def accepted() -> Iterator[Tensor]:
            nonlocal drawn
            for tokens, log_weights in self._blocks(hidden, context, position):
                drawn += len(tokens)
                level = torch.rand(len(tokens), dtype=torch.float64, generator=generator).log()
                yield from tokens[level < log_weights]

        stream = accepted()
        chunk = sample_exact(
            lambda count, _: torch.stack([next(stream) for _ in range(count)]),
            options.temperature,
            generator,
            options.max_calls,
        )
        return Chunk(chunk.tokens.tolist(), drawn, inverse_parts(options.temperature)[0])

    def _blocks(self, hidden: Tensor, context: Context, position: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of N weighed draws, as `_weighed` gives them; CallLimitError once `max_calls` are drawn."""
        options = self._options
        for block in range(-(-options.max_calls // options.samples)):
            yield self._weighed(hidden, context, position, block)
        raise CallLimitError(
            f"{options.max_calls} draws gave no chunk at temperature={options.temperature} under its known tokens and "
            "the predicate: raise max_calls, allow more chunks, or take the batch method."
        )

    def _weighed(self, hidden: Tensor, context: Context, position: int, block: int) -> tuple[Tensor, Tensor]:
        """N chunks `[N, K]` that begin with the known tokens, and their log weights `[N]`, both on the host.

        A latent z weighs as much as the decoder's probability of the known tokens at z, and nothing if its chunk is
        not allowed.
        """
        drawn = self._draw(hidden, [context], position, self._options.samples, block)
        log_weights = drawn.fix(context.known)[0].cpu()
        drawn.decode_whole(torch.ones_like(drawn.tokens[..., 0], dtype=torch.bool))
        tokens = drawn.tokens[0].cpu()
        if self._allowed is not None:
            log_weights = log_weights.masked_fill(~self._allowed(tokens, context.tokens), -math.inf)
        return tokens, log_weights

    def _draw(
        self, hidden: Tensor, contexts: Sequence[Context], position: int, draws: int, block: int = 0
    ) -> DrawnTokens:
        seeds = [context.seed for context in contexts]
        noise = SampleNoise(block, seeds, hidden.device, purpose=f"generation/{position}")
        out = self._loaded.model.head.sample(hidden, noise, draws)[0]
        tokenizer = self._loaded.tokenizer
        return DrawnTokens(self._decoder, out, tokenizer.eos, tokenizer.pad)

    def _generator(self, context: Context, position: int) -> torch.Generator:
        """The stream of the choice among the draws."""
        return torch.Generator().manual_seed(stream_seed(context.seed, "generation/choice", position))


def _resampled(tokens: Tensor, log_weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draws `[N', K]` that stand for the weighed ones `[N, K]`: those of weight 0 left out, the others drawn by weight.

    Draws of equal weight are taken as they are.
    """
    possible = log_weights.isfinite()
    tokens, log_weights = tokens[possible], log_weights[possible]
    if (log_weights == log_weights[0]).all():
        return tokens
    return tokens[log_weights.softmax(0).multinomial(len(tokens), replacement=True, generator=generator)]
