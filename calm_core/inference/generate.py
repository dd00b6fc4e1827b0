"""Generation: prompts in, text out, one chunk at a time with a key-value cache."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from calm_core.config.experiment import SamplesConfig
from calm_core.errors import UserError
from calm_core.inference.load_model import Loaded
from calm_core.inference.sampler import Allowed, Chunk, ChunkSampler, Context, GenerationOptions
from calm_core.inference.text import TextStream
from calm_core.model.cache import KeyValueCache


def prompt_tokens(
    text: Sequence[int], k: int, bos: int, eos: int, partial: Literal["weigh", "shift"] = "weigh"
) -> list[int]:
    """The tokens a generation starts from: bos and the prompt, at least one whole chunk.

    The model predicts a chunk from those before it, so the first chunk is never sampled. Where bos and the prompt do
    not fill it, eos tokens come before bos: in training, too, a document begins anywhere in a chunk, after the eos of
    another. `shift` uses the same freedom for a prompt of any length: it puts its end on the end of a chunk, so that
    no chunk is sampled under known tokens.
    """
    document = [bos, *text]
    missing = -len(document) % k if partial == "shift" else max(0, k - len(document))
    return [eos] * missing + document


FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Completion:
    """What one prompt led to.

    Attributes:
        prompt: as given.
        text: generated, without the prompt and the stop text.
        tokens: generated, at most `max_tokens`; without eos, and with those of the stop text.
        reason: what ended it: eos, a stop text, or the most tokens.
        seed: of its noise: with it the prompt has the same completion in any batch.
        draws: latents drawn, over all chunks.
        chunks: sampled.
        agreed: share of the chunks for which n draws agreed, T = 1/n; the others are less sharp than asked.
        effective_samples: draws behind a chunk that the prompt ends in, by weight (1 / sum of squared weights); None
            if it ends with a chunk, or under the exact method.
    """

    prompt: str
    text: str
    tokens: list[int]
    reason: FinishReason
    seed: int
    draws: int
    chunks: int
    agreed: float
    effective_samples: float | None


@dataclass
class _Request:
    """One row of the batch: the tokens so far, prompt included, on the grid of chunks."""

    prompt: str
    seed: int
    tokens: list[int]
    stream: TextStream
    chunks: list[Chunk] = field(default_factory=list)
    reason: FinishReason | None = None

    def chunk(self, position: int, k: int, pad: int) -> list[int]:
        """The tokens of one chunk, filled up by pad once the request is finished."""
        chunk = self.tokens[position * k : (position + 1) * k]
        return chunk + [pad] * (k - len(chunk))

    def context(self, position: int, k: int) -> Context:
        """What the chunk at `position` is drawn from."""
        return Context(self.seed, self.tokens[: position * k], self.tokens[position * k :])

    def take(self, chunk: Chunk, known: int, eos: int, max_tokens: int) -> None:
        """Append a chunk of which the first `known` tokens are there: as far as eos, a stop text and the end allow."""
        self.chunks.append(chunk)
        new = chunk.tokens[known:]
        self.tokens += new
        room = max_tokens - len(self.stream.tokens)
        spoken = new[: new.index(eos)] if eos in new else new
        self.stream.add(spoken[:room])
        if self.stream.stopped:
            self.reason = "stop"
        elif eos in new and len(spoken) < room:
            self.reason = "eos"
        elif len(spoken) >= room:
            self.reason = "length"


@torch.inference_mode()
def generate(
    loaded: Loaded,
    prompts: Sequence[str],
    options: GenerationOptions,
    seeds: Sequence[int] | None = None,
    allowed: Allowed | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """Continue each prompt; an empty one continues the beginning of a document.

    All prompts advance together, a chunk at a time: those that are longer read on while the shorter ones are spoken
    for. Nothing is padded, and each request has noise of its own, so its text does not depend on the batch (but for
    rounding in matrix products of another size). The prefix runs through the backbone once.

    Args:
        loaded: model, autoencoder, tokenizer.
        prompts: texts.
        options: how to sample, when to stop.
        seeds: one per prompt, in place of `options.seed` and those that follow it.
        allowed: which chunks may follow what is there; the others are not chosen.
        on_text: called with the prompt's index and each new piece of its text; the pieces together are the text.

    Raises:
        UserError: prompt and `max_tokens` take more positions than the model was trained on.
        CallLimitError: no chunk was accepted in `max_calls` draws.
    """
    k, tokenizer = loaded.shape.k, loaded.tokenizer
    requests = _requests(loaded, prompts, options, seeds)
    sampler = ChunkSampler(loaded, options, allowed)
    for position, hidden in _positions(loaded, requests):
        due = [i for i, r in enumerate(requests) if r.reason is None and len(r.tokens) < (position + 1) * k]
        contexts = [requests[i].context(position, k) for i in due]
        chunks = sampler.next_chunks(hidden[:, due], contexts, position)
        for i, context, chunk in zip(due, contexts, chunks, strict=True):
            requests[i].take(chunk, len(context.known), tokenizer.eos, options.max_tokens)
            piece = requests[i].stream.take(last=requests[i].reason is not None)
            if on_text is not None and piece:
                on_text(i, piece)
    return [_completion(request, options) for request in requests]


@torch.inference_mode()
def expected_calls(loaded: Loaded, prompts: Sequence[str], options: GenerationOptions) -> list[float]:
    """The draws that the exact method will take for the first chunk of each prompt on average, estimated.

    From `options.samples` draws; infinite where too few of them agree to tell.
    """
    sampler, k = ChunkSampler(loaded, options), loaded.shape.k
    estimates = []
    for request in _requests(loaded, prompts, options, None):
        position, hidden = next(_positions(loaded, [request]))
        estimates.append(sampler.expected_calls(hidden, request.context(position, k), position))
    return estimates


def _requests(
    loaded: Loaded, prompts: Sequence[str], options: GenerationOptions, seeds: Sequence[int] | None
) -> list[_Request]:
    tokenizer, k = loaded.tokenizer, loaded.shape.k
    seeds = range(options.seed, options.seed + len(prompts)) if seeds is None else seeds
    requests = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        text = tokenizer.encode(prompt)
        tokens = prompt_tokens(text, k, tokenizer.bos, tokenizer.eos, options.partial)
        positions = -(-(len(tokens) + options.max_tokens) // k) - 1  # the last chunk is not read
        if positions > loaded.positions:
            raise UserError(
                f"a prompt of {len(text)} tokens and max_tokens={options.max_tokens} take {positions} chunks, but the "
                f"model was trained on {loaded.positions}: shorten the prompt or lower max_tokens."
            )
        requests.append(_Request(prompt, seed, tokens, TextStream(tokenizer, text[-1:], options.stop)))
    return requests


def _positions(loaded: Loaded, requests: Sequence[_Request]) -> Iterator[tuple[int, Tensor]]:
    """(p, hidden states `[1, R, d]` that foretell chunk p) while a request is unfinished.

    First all chunks that every prompt fills, at once; then one by one, of what the requests hold by then.
    """
    k, pad, cache = loaded.shape.k, loaded.tokenizer.pad, KeyValueCache()
    device = next(loaded.model.parameters()).device
    start, end = 0, min((len(request.tokens) // k for request in requests), default=0)
    while any(request.reason is None for request in requests):
        chunks = [[request.chunk(p, k, pad) for p in range(start, end)] for request in requests]
        hidden = loaded.model.hidden(torch.tensor(chunks, device=device), cache)
        yield end, hidden[-1:]
        start, end = end, end + 1


def _completion(request: _Request, options: GenerationOptions) -> Completion:
    agreed = [chunk.agreement >= int(1 / options.temperature + 1e-9) for chunk in request.chunks]
    return Completion(
        prompt=request.prompt,
        text=request.stream.text,
        tokens=request.stream.tokens,
        reason=request.reason or "length",
        seed=request.seed,
        draws=sum(chunk.draws for chunk in request.chunks),
        chunks=len(agreed),
        agreed=sum(agreed) / len(agreed),
        effective_samples=request.chunks[0].effective_samples,
    )


def continue_prompts(loaded: Loaded, config: SamplesConfig, seed: int) -> list[dict[str, Any]]:
    """One record a temperature and prompt: both, the text, and what else a `Completion` tells.

    The same seed gives the same noise, so that the texts of two checkpoints differ by their weights alone.
    """
    records = []
    for temperature in config.temperatures:
        options = GenerationOptions(max_tokens=config.max_tokens, temperature=temperature, seed=seed)
        for completion in generate(loaded, config.prompts, options):
            records.append({"temperature": temperature, **asdict(completion)})
    return records


def summary(completion: Completion, options: GenerationOptions) -> str:
    """One line: length and end, and how far the sampling can be trusted."""
    parts = [
        f"{len(completion.tokens)} tokens, ended by {completion.reason}",
        f"seed {completion.seed}",
        f"{completion.draws / completion.chunks:.0f} draws per chunk",
    ]
    if completion.effective_samples is not None:
        parts.append(f"effective sample size {completion.effective_samples:.1f} of {options.samples} at the prompt")
    if options.method == "batch" and options.temperature < 1:
        parts.append(f"temperature approximate, from {options.samples} draws")
    if completion.agreed < 1:
        parts.append(f"{completion.agreed:.0%} of the chunks as sharp as temperature {options.temperature:.3g} asks")
    return "; ".join(parts)
