"""Generation: prompts in, text out, one chunk at a time; and a forecast of what a temperature takes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from calm_core.config.experiment import SamplesConfig
from calm_core.config.generation_config import GenerationOptions, whole_inverse
from calm_core.inference.load_model import Loaded
from calm_core.inference.request import FinishReason, Request, hidden_states, new_requests
from calm_core.inference.sampler import PILOT, Allowed, ChunkSampler, Context, Sharpness

ENOUGH = 0.95  # of the first chunks reach the temperature with the number of draws that is recommended


@dataclass(frozen=True)
class Completion:
    """The continuation of one prompt, and how it was made.

    Attributes:
        prompt: its text.
        text: generated, without the prompt and the stop text.
        tokens: generated, at most `max_tokens`; without eos, and with those of the stop text.
        reason: what ended it: the end of the document (eos, or what marks it in data without eos), a stop text, or
            `max_tokens`.
        seed: of its noise: with it the prompt has the same continuation in any batch.
        draws: made, over all chunks.
        chunks: sampled.
        agreed: fraction of the chunks that have the temperature asked for: for T = 1/n by the batch method, those for
            which n draws agreed; the others are less sharp.
        effective_samples: draws behind the chunk that the prompt ends in, by weight (1 / sum of squared weights); None
            if the prompt ends with a chunk, or the method is exact.
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


@torch.inference_mode()
def generate(
    loaded: Loaded,
    prompts: Sequence[str | Sequence[int]],
    options: GenerationOptions,
    seeds: Sequence[int] | None = None,
    allowed: Allowed | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """Continue each prompt; an empty one continues the beginning of a document.

    All prompts advance together, a chunk at a time: while a longer prompt is still being read, the shorter ones are
    already continued. Nothing is padded, and each request has noise of its own, so its text does not depend on the
    batch (up to rounding in matrix products of another size). The prefix runs through the backbone once.

    Args:
        loaded: model, autoencoder, tokenizer.
        prompts: texts, or the tokens of texts, without bos.
        options: how to sample, when to stop.
        seeds: one per prompt, in place of `options.seed` and those that follow it.
        allowed: which chunks may follow what is there; the others are not chosen.
        on_text: called with the prompt's index and each new stretch of its text; joined, they are the text.

    Raises:
        UserError: prompt and `max_tokens` take more positions than the model was trained on, or an option cannot
            apply to the model.
        CallLimitError: no chunk was accepted in `max_calls` draws.
    """
    k = loaded.shape.k
    sampler = ChunkSampler(loaded, options, allowed)
    requests = new_requests(loaded, prompts, options, seeds)
    for position, hidden in hidden_states(loaded, requests):
        due = [i for i, r in enumerate(requests) if r.reason is None and len(r.tokens) < (position + 1) * k]
        if not due:  # the short prompts are done, the long ones are still being read
            continue
        contexts = [requests[i].context(position, k) for i in due]
        chunks = sampler.next_chunks(hidden[:, due], contexts, position)
        for i, context, chunk in zip(due, contexts, chunks, strict=True):
            requests[i].append(chunk, len(context.known))
            text = requests[i].stream.take(last=requests[i].reason is not None)
            if on_text is not None and text:
                on_text(i, text)
    return [_completion(request) for request in requests]


def _completion(request: Request) -> Completion:
    return Completion(
        prompt=request.prompt,
        text=request.stream.text,
        tokens=request.stream.tokens,
        reason=request.reason or "length",
        seed=request.seed,
        draws=sum(chunk.draws for chunk in request.chunks),
        chunks=len(request.chunks),
        agreed=sum(chunk.reached for chunk in request.chunks) / len(request.chunks),
        effective_samples=request.chunks[0].effective_samples,
    )


def continue_prompts(loaded: Loaded, config: SamplesConfig, seed: int) -> list[dict[str, Any]]:
    """One record per temperature and prompt: both, the text, and the other fields of a `Completion`.

    The same seed gives the same noise, so that the texts of two checkpoints differ by their weights alone.
    """
    records = []
    for temperature in config.temperatures:
        for completion in generate(loaded, config.prompts, config.options(temperature, seed)):
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


@torch.inference_mode()
def expected_calls(loaded: Loaded, prompts: Sequence[str], options: GenerationOptions) -> list[float]:
    """The mean number of draws that the exact method takes for the first chunk of each prompt, estimated.

    From `options.samples` draws; infinite where too few of them agree to tell.
    """
    sampler = ChunkSampler(loaded, options)
    return [sampler.expected_calls(*first) for first in _first_chunks(loaded, prompts, options)]


@torch.inference_mode()
def sharpness(loaded: Loaded, prompts: Sequence[str], options: GenerationOptions) -> list[Sharpness]:
    """How far the batch method can follow T = 1/n at the first chunk of each prompt."""
    sampler = ChunkSampler(loaded, options)
    return [sampler.sharpness(*first) for first in _first_chunks(loaded, prompts, options)]


def _first_chunks(
    loaded: Loaded, prompts: Sequence[str], options: GenerationOptions
) -> Iterator[tuple[torch.Tensor, Context, int]]:
    """For each prompt, what its first chunk is sampled from: hidden state, context and position."""
    for request in new_requests(loaded, prompts, options):
        position, hidden = next(hidden_states(loaded, [request]))
        yield hidden, request.context(position, loaded.shape.k), position


def forecast(loaded: Loaded, prompts: Sequence[str], options: GenerationOptions) -> str | None:
    """One line about the temperature; None where it is always reached, with logits or at T = 1.

    For the exact method it is the number of draws. For the batch method it is how often N draws suffice, and the
    largest N that pays: with that many draws, n of them agree for 95 % of the first chunks.
    """
    options = options.for_head(loaded.has_logits)
    if options.method == "exact":
        calls = ", ".join(f"{calls:.0f}" for calls in expected_calls(loaded, prompts, options))
        return f"exact temperature: about {calls} draws for the first chunk, at most {options.max_calls}"
    if options.method == "logits" or options.temperature == 1:
        return None
    n, found = whole_inverse(options.temperature), sharpness(loaded, prompts, options)
    agreement, reached = (sum(getattr(one, name) for one in found) / len(found) for name in ("agreement", "reached"))
    needed = torch.cat([one.needed for one in found]).sort().values
    enough = needed[int(ENOUGH * (len(needed) - 1))].item()
    advice = (
        f"--samples {enough:.0f} suffices for {ENOUGH:.0%} of them"
        if enough <= PILOT * options.samples
        else f"{PILOT} times as many do not suffice for {ENOUGH:.0%} of them"
    )
    return (
        f"temperature 1/{n}: {n} draws agree with probability {agreement:.2g}; {options.samples} draws contain "
        f"{n} that agree for about {reached:.0%} of first chunks, {advice}"
    )
