"""The next chunk of each request: draws of the head, and which of them is chosen."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from calm_core.config.generation_config import GenerationOptions, whole_inverse
from calm_core.errors import UserError
from calm_core.inference.decoding import DocumentEnd, DrawnTokens, decode_given
from calm_core.inference.load_model import Loaded
from calm_core.inference.temperature import (
    CallLimitError,
    agreement_probability,
    draw_tokens,
    draws_until_agreement,
    estimate_calls,
    sample_batch,
    sample_exact,
    sample_weighted,
    token_weights,
)
from calm_core.model.noise import SampleNoise, stream_seed

TRIALS = 8  # sets of n draws that are tried before all N draws are made

PILOT = 4  # times N, draws from which the sharpness of a temperature is estimated

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
        tokens: K of them; pad follows the end of a document.
        draws: made for it.
        reached: whether it has the temperature asked for: False where fewer than n draws agreed, T = 1/n.
        effective_samples: the draws its choice rests on by weight; None where no token of it was known.
    """

    tokens: list[int]
    draws: int
    reached: bool = True
    effective_samples: float | None = None


@dataclass(frozen=True)
class Sharpness:
    """How far the batch method can follow a temperature T = 1/n at one position, estimated before sampling.

    Attributes:
        agreement: the probability that n draws agree.
        reached: the probability that N draws contain n that agree: otherwise the chunk is less sharp than asked.
        needed: numbers of draws `[shuffles]` it took until n agreed; infinite where `PILOT` times N did not suffice.
    """

    agreement: float
    reached: float
    needed: Tensor


class ChunkSampler:
    """Chooses the next chunk of each request: a function of its hidden state, its context and the position alone.

    The methods of `GenerationOptions`, and where each is used:
        logits: the probabilities are known (`_by_logits`).
        exact: always by rejection (`_by_rejection`).
        batch: from N draws. Those of a context with known tokens or a predicate have weights (`_by_weight`); all
            others count alike, which saves most of their decoding (`_by_agreement`).
    """

    def __init__(self, loaded: Loaded, options: GenerationOptions, allowed: Allowed | None = None) -> None:
        self._loaded, self._allowed = loaded, allowed
        self._options = options.for_head(loaded.has_logits)
        self._end = DocumentEnd(loaded.documents.ends(loaded.tokenizer), loaded.tokenizer.pad)

    def next_chunks(self, hidden: Tensor, contexts: Sequence[Context], position: int) -> list[Chunk]:
        """The chunk at `position` for each of R contexts, from the hidden states `[1, R, d]` before it."""
        if self._options.method == "logits":
            return self._by_logits(hidden, contexts, position)
        if self._options.method == "exact":
            return [self._by_rejection(hidden[:, i : i + 1], c, position) for i, c in enumerate(contexts)]
        weighted = [bool(context.known) or self._allowed is not None for context in contexts]
        alike = [i for i, has_weights in enumerate(weighted) if not has_weights]
        chosen = dict(
            zip(alike, self._by_agreement(hidden[:, alike], [contexts[i] for i in alike], position), strict=True)
        )
        return [
            self._by_weight(hidden[:, i : i + 1], context, position) if weighted[i] else chosen[i]
            for i, context in enumerate(contexts)
        ]

    def expected_calls(self, hidden: Tensor, context: Context, position: int) -> float:
        """The mean number of draws that the exact method takes here, estimated from N draws; hidden `[1, 1, d]`."""
        tokens, log_weights = self._weighted_draws(hidden, context, position, block=0)
        accepted = log_weights.exp().mean().item()
        if not accepted:
            return math.inf
        return estimate_calls(tokens, self._options.temperature, log_weights) / accepted

    def sharpness(self, hidden: Tensor, context: Context, position: int) -> Sharpness:
        """How far the batch method can follow the temperature here, from `PILOT` times N draws; hidden `[1, 1, d]`."""
        whole, n = whole_inverse(self._options.temperature), self._options.samples
        blocks = [self._weighted_draws(hidden, context, position, block) for block in range(PILOT)]
        tokens, log_weights = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        possible = log_weights.isfinite()
        if not possible.any():
            return Sharpness(0.0, 0.0, torch.tensor([math.inf]))
        tokens, log_weights = tokens[possible], log_weights[possible]
        needed = draws_until_agreement(tokens, whole, self._generator(context, position)) / possible.double().mean()
        agreement = agreement_probability(tokens, log_weights, whole) if len(tokens) >= whole else 0.0
        return Sharpness(agreement, (needed <= n).double().mean().item(), needed)

    def _by_logits(self, hidden: Tensor, contexts: Sequence[Context], position: int) -> list[Chunk]:
        """Tokens from P^(1/T)/Z, truncated by top-k and top-p, for R contexts: hidden `[1, R, d]`."""
        options, head = self._options, self._loaded.model.head
        logits = head.logits(hidden)[0]  # [R, V]
        if self._allowed is not None:
            every = torch.arange(logits.shape[-1]).unsqueeze(-1)
            allowed = torch.stack([self._allowed(every, context.tokens) for context in contexts])
            if not allowed.any(-1).all():
                raise UserError("The predicate allows no token at all: allow more tokens.")
            logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
        uniform = self._noise(contexts, position, hidden.device).uniform("softmax/sample", 1)[0]
        tokens = draw_tokens(token_weights(logits, options.temperature, options.top_k, options.top_p), uniform)
        return [Chunk([token], draws=1) for token in tokens.tolist()]

    def _by_agreement(self, hidden: Tensor, contexts: Sequence[Context], position: int) -> list[Chunk]:
        """About P^n/Z at T = 1/n from N draws that count alike, for R contexts at once: hidden `[1, R, d]`.

        The batch method chooses one of the sets of n draws that agree, each with the same probability. Drawing random
        sets until one agrees does the same:
          1. Try a few random sets. Where chunks are peaked one of them agrees, and the draws that no set contains need
             not be made. All draws are alike before they are made: those that the sets contain are made first.
          2. Where no set agreed, make all N draws and choose among those that agree, n times or, failing that, less
             often (`_choose`).
        """
        if not contexts:
            return []
        whole = whole_inverse(self._options.temperature)
        draws = self._options.samples if whole > 1 else 1  # at T = 1 any draw will do
        level, first = min(whole, draws), min(TRIALS * whole, draws)
        generators = [self._generator(context, position) for context in contexts]
        drawn = self._draw(hidden, contexts, position, first)
        sets = torch.stack([_random_sets(draws, level, generator) for generator in generators]).to(hidden.device)
        agree = drawn.agree(sets)
        winner = sets[..., 0].gather(1, agree.int().argmax(1, keepdim=True))  # a draw of the first set that agrees
        tokens = drawn.tokens.take_along_dim(winner.unsqueeze(-1), 1).squeeze(1)
        chunks = [Chunk(row, first, level == whole) for row in tokens.tolist()]
        left = (~agree.any(1)).nonzero().squeeze(1)
        if len(left):
            those = [contexts[i] for i in left]
            drawn = drawn.rows(left)
            if draws > first:
                drawn = drawn.followed_by(self._draw(hidden[:, left], those, position, draws - first, block=1))
            chosen = _choose(drawn, level, [generators[i] for i in left])
            for i, (tokens, agreement) in zip(left.tolist(), chosen, strict=True):
                chunks[i] = Chunk(tokens, draws, agreement == whole)
        return chunks

    def _by_weight(self, hidden: Tensor, context: Context, position: int) -> Chunk:
        """About P^n/Z at T = 1/n from N draws weighted by known tokens and the predicate. Hidden `[1, 1, d]`."""
        drawn = 0
        for tokens, log_weights in self._blocks(hidden, context, position):
            drawn += len(tokens)
            if log_weights.isfinite().any():
                break
        effective = 1 / log_weights.softmax(0).square().sum().item() if context.known else None
        temperature = self._options.temperature
        chunk = sample_weighted(tokens, log_weights, temperature, self._generator(context, position))
        return Chunk(chunk.tokens.tolist(), drawn, int(chunk.agreement) == whole_inverse(temperature), effective)

    def _by_rejection(self, hidden: Tensor, context: Context, position: int) -> Chunk:
        """P^(1/T)/Z exactly: a draw counts with the probability of the known tokens under it. Hidden `[1, 1, d]`."""
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
        return Chunk(chunk.tokens.tolist(), drawn)

    def _blocks(self, hidden: Tensor, context: Context, position: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of N draws, as `_weighted_draws` returns them; CallLimitError once `max_calls` are made."""
        options = self._options
        for block in range(-(-options.max_calls // options.samples)):
            yield self._weighted_draws(hidden, context, position, block)
        raise CallLimitError(
            f"{options.max_calls} draws gave no chunk at temperature={options.temperature} under its known tokens and "
            "the predicate: raise max_calls, allow more chunks, or choose the batch method."
        )

    def _weighted_draws(self, hidden: Tensor, context: Context, position: int, block: int) -> tuple[Tensor, Tensor]:
        """N chunks `[N, K]` that begin with the known tokens, and their log weights `[N]`, both on the host.

        The weight of a latent is the decoder's probability of the known tokens, and 0 if its chunk is not allowed.
        """
        drawn = self._sample(hidden, [context], position, self._options.samples, block)[0]
        autoencoder = self._loaded.autoencoder
        if autoencoder is None:
            tokens, log_weights = drawn, torch.zeros(len(drawn), dtype=torch.float64)
        else:
            tokens, log_weights = decode_given(autoencoder, drawn, context.known, self._end)
        tokens, log_weights = tokens.cpu(), log_weights.cpu()
        if self._allowed is not None:
            log_weights = log_weights.masked_fill(~self._allowed(tokens, context.tokens), -math.inf)
        return tokens, log_weights

    def _draw(
        self, hidden: Tensor, contexts: Sequence[Context], position: int, draws: int, block: int = 0
    ) -> DrawnTokens:
        drawn = self._sample(hidden, contexts, position, draws, block)
        return DrawnTokens.of(self._loaded.autoencoder, drawn, self._end)

    def _sample(self, hidden: Tensor, contexts: Sequence[Context], position: int, draws: int, block: int) -> Tensor:
        """Draws of the head: latents `[R, draws, l]`, or tokens `[R, draws, 1]`."""
        noise = self._noise(contexts, position, hidden.device, block)
        return self._loaded.model.head.sample(hidden, noise, draws)[0]

    def _noise(self, contexts: Sequence[Context], position: int, device: torch.device, block: int = 0) -> SampleNoise:
        return SampleNoise(block, [context.seed for context in contexts], device, purpose=f"generation/{position}")

    def _generator(self, context: Context, position: int) -> torch.Generator:
        """The stream of the choice among the draws."""
        return torch.Generator().manual_seed(stream_seed(context.seed, "generation/choice", position))


def _random_sets(draws: int, size: int, generator: torch.Generator) -> Tensor:
    """`TRIALS` random sets of `size` out of N draws, `[TRIALS, size]`, the draws in them numbered from 0."""
    sets = torch.rand(TRIALS, draws, generator=generator).argsort(-1)[:, :size]
    return sets.unique(return_inverse=True)[1]


def _choose(drawn: DrawnTokens, level: int, generators: Sequence[torch.Generator]) -> list[tuple[list[int], int]]:
    """A chunk for each of R rows and how many draws agree on it: `level`, or the most that do.

    It is that of a random set of that many draws that agree. Only draws that agree that often are decoded to the end.
    """
    rows, draws, _ = drawn.tokens.shape
    device = drawn.tokens.device
    one = torch.stack([torch.randint(draws, (1,), generator=g) for g in generators]).to(device)
    agreement = torch.zeros(rows, dtype=torch.int64, device=device)
    candidates = torch.zeros(rows, draws, dtype=torch.bool, device=device)
    for agreeing in range(level, 0, -1):
        left = agreement == 0
        if agreeing > 1:
            found = drawn.shared_by(agreeing, left)
        else:  # all differ: any one of them, and only that one is decoded
            found = (torch.arange(draws, device=device) == one) & left.unsqueeze(-1)
            drawn.decode(found)
        agreement[found.any(-1)] = agreeing
        candidates |= found
    return [
        (sample_batch(tokens[those], 1 / n, generator).tokens.tolist(), n)
        for tokens, those, n, generator in zip(
            drawn.tokens.cpu(), candidates.cpu(), agreement.tolist(), generators, strict=True
        )
    ]
