"""The next chunk of each request: draws of the head, and which of them is taken."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from calm_core.config import option
from calm_core.errors import UserError
from calm_core.inference.decoding import DrawnTokens
from calm_core.inference.load_model import Loaded
from calm_core.inference.temperature import (
    CallLimitError,
    estimate_calls,
    inverse_parts,
    sample_batch,
    sample_exact,
    sample_weighted,
    whole_inverse,
)
from calm_core.model.noise import SampleNoise, stream_seed


@dataclass(frozen=True)
class GenerationOptions:
    """How text is generated; the same for every prompt of a call.

    There are two ways for a prompt that ends inside a chunk, since neither serves always. `weigh`, the default, keeps
    the prompt where it is and follows the model's own distribution given the known tokens, as N grows; where few draws
    agree with them, little is left of N (the effective sample size says how much), and the exact method, which then
    refuses most draws, becomes dear. `shift` wastes no draw, but moves the document on the grid of chunks and begins it
    by up to K - 1 eos more than the one that precedes a document in training.
    """

    max_tokens: int = option(256, "most tokens generated per prompt, exactly: the last chunk is cut")
    temperature: float = option(1.0, "T: chunks follow P^(1/T)/Z; 0 < T <= 1, and 1/n for the batch method")
    method: Literal["batch", "exact"] = option("batch", "batch: approximate, from N draws; exact: by rejection")
    samples: int = option(100, "N, draws per chunk; the exact method draws that many at a time")
    max_calls: int = option(10_000, "most draws for one chunk, where some of them may be refused")
    seed: int = option(0, "seed of the first prompt; the next prompts have the next seeds")
    stop: tuple[str, ...] = option((), "texts that end the generation; they are not part of it")
    partial: Literal["weigh", "shift"] = option(
        "weigh",
        "a prompt that ends inside a chunk: weigh draws of the chunk by its known tokens, or shift the prompt to the "
        "chunk's end by eos tokens before bos",
    )

    def __post_init__(self) -> None:
        for name in ("max_tokens", "samples", "max_calls"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        for name, choices in (("method", ("batch", "exact")), ("partial", ("weigh", "shift"))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)!r} is unknown: choose {' or '.join(choices)}.")
        if "" in self.stop:
            raise UserError("stop holds an empty text, which every text begins with: leave it out.")
        (whole_inverse if self.method == "batch" else inverse_parts)(self.temperature)


TRIALS = 8  # sets of n draws that are tried before all N draws are made

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
        return estimate_calls(tokens, self._options.temperature, log_weights) / accepted

    def _free(self, hidden: Tensor, contexts: Sequence[Context], position: int) -> list[Chunk]:
        """Batch approximation with every draw as good as the next, for R contexts at once: hidden `[1, R, d]`.

        Equal in distribution to decoding all N draws and `sample_batch` of them, which takes one of the sets of n draws
        that agree, each as likely as the next. So does drawing sets until one agrees. A few sets are tried in that
        way; where chunks are peaked one of them agrees, and the draws that no set names are never made. Draws are
        alike before they are made: those that the sets name are the first.
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
        winner = sets[..., 0].gather(1, agree.int().argmax(1, keepdim=True))  # of the first set that agrees
        tokens = drawn.tokens.gather(1, winner.unsqueeze(-1).expand(-1, -1, drawn.tokens.shape[-1])).squeeze(1)
        found = agree.any(1)
        chunks = [Chunk(row, first, level) for row in tokens.tolist()]
        if not found.all():
            left = (~found).nonzero().squeeze(1)
            drawn.keep(left)
            if draws > first:
                drawn.append(self._draw(hidden[:, left], [contexts[i] for i in left], position, draws - first, block=1))
            for i, chunk in zip(left.tolist(), _choose(drawn, level, [generators[i] for i in left]), strict=True):
                chunks[i] = chunk
        return chunks

    def _bound(self, hidden: Tensor, context: Context, position: int) -> Chunk:
        """Batch approximation under known tokens or a predicate, which weigh the draws. Hidden `[1, 1, d]`."""
        drawn = 0
        for tokens, log_weights in self._blocks(hidden, context, position):
            drawn += len(tokens)
            if log_weights.isfinite().any():
                break
        effective = 1 / log_weights.softmax(0).square().sum().item() if context.known else None
        generator = self._generator(context, position)
        chunk = sample_weighted(tokens, log_weights, self._options.temperature, generator)
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
        drawn.decode(torch.ones_like(drawn.tokens[..., 0], dtype=torch.bool), start=len(context.known))
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
        return DrawnTokens(self._loaded.autoencoder, out, tokenizer.eos, tokenizer.pad)

    def _generator(self, context: Context, position: int) -> torch.Generator:
        """The stream of the choice among the draws."""
        return torch.Generator().manual_seed(stream_seed(context.seed, "generation/choice", position))


def _random_sets(draws: int, size: int, generator: torch.Generator) -> Tensor:
    """`TRIALS` random sets of `size` out of N draws, `[TRIALS, size]`, the draws they name numbered from 0."""
    sets = torch.rand(TRIALS, draws, generator=generator).argsort(-1)[:, :size]
    return sets.unique(return_inverse=True)[1]


def _choose(drawn: DrawnTokens, level: int, generators: Sequence[torch.Generator]) -> list[Chunk]:
    """One of the sets of `level` draws that agree, for each of R rows; where there is none, of fewer.

    Only draws that agree so often have a weight, so only they are decoded to the end.
    """
    rows, draws, _ = drawn.tokens.shape
    device = drawn.tokens.device
    one = torch.stack([torch.randint(draws, (1,), generator=g) for g in generators]).to(device)
    agreement = torch.zeros(rows, dtype=torch.int64, device=device)
    kept = torch.zeros(rows, draws, dtype=torch.bool, device=device)
    for agreeing in range(level, 0, -1):
        left = agreement == 0
        if agreeing > 1:
            found = drawn.agreeing(agreeing, left)
        else:  # all differ: any one of them, and only that one is decoded
            found = (torch.arange(draws, device=device) == one) & left.unsqueeze(-1)
            drawn.decode(found)
        agreement[found.any(-1)] = agreeing
        kept |= found
    return [
        Chunk(sample_batch(tokens[k], 1 / n, g).tokens.tolist(), draws, n)
        for tokens, k, n, g in zip(drawn.tokens.cpu(), kept.cpu(), agreement.tolist(), generators, strict=True)
    ]
