"""A prompt being continued: what it starts from, its tokens and text so far, the hidden states of its next chunk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from calm_core.config.generation_config import GenerationOptions
from calm_core.errors import UserError
from calm_core.inference.load_model import DocumentFormat, Loaded
from calm_core.inference.sampler import Chunk, Context
from calm_core.model.attention import KeyValueCache
from calm_core.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length"]

UNFINISHED = "\ufffd"  # what the bytes of a character decode to while the last one is missing


def prompt_tokens(
    text: Sequence[int],
    k: int,
    tokenizer: Tokenizer,
    documents: DocumentFormat,
    partial: Literal["weigh", "shift"] = "weigh",
) -> list[int]:
    """The tokens that a generation starts from: bos and the prompt, at least one whole chunk.

    The model predicts a chunk from those before it, so the first chunk is never sampled. Where bos and the prompt do
    not fill it, something the model knows from training comes before them:
      - packed documents begin anywhere in a chunk, after the eos of another: eos tokens, or, where documents have no
        eos, further bos, each an empty document;
      - aligned documents begin a chunk: the last chunk of another document, its end and the padding after it.

    `shift` puts such tokens before a packed prompt of any length, so that the prompt ends with a chunk and no chunk is
    sampled under known tokens.

    Raises:
        UserError: `shift` for aligned documents, which never begin inside a chunk.
    """
    document = [tokenizer.bos, *text]
    end = tokenizer.eos if documents.eos else tokenizer.bos
    if documents.packing == "align":
        if partial == "shift":
            raise UserError(
                "partial=shift would begin the prompt inside a chunk, but the documents that this model was trained on "
                "each begin a chunk (data.packing=align): choose partial=weigh."
            )
        return [end, *[tokenizer.pad] * (k - 1), *document] if len(document) < k else document
    missing = -len(document) % k if partial == "shift" else max(0, k - len(document))
    return [end] * missing + document


def read_prompts(texts: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of a command line and of a file, whose whole text is one; without any, the beginning of a document.

    The text of a file is kept as it is, line ends included, as that of a corpus is.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    prompts = list(texts)
    if file is not None:
        try:
            prompts.append(file.read_bytes().decode())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Cannot read the prompt in {file} ({error}): give a text file in UTF-8.") from error
    return prompts or [""]


def require_text(prompts: Sequence[str]) -> None:
    """Refuse prompts that are not valid Unicode: bytes of a command line that are not UTF-8 become lone surrogates.

    Raises:
        UserError: naming the prompt.
    """
    for number, prompt in enumerate(prompts, start=1):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"prompt {number} is not valid UTF-8 from character {error.start + 1} on: give it in UTF-8."
            ) from error


class TextStream:
    """The text of a growing list of tokens, which ends with the first token that completes a stop text.

    An unfinished character, or the beginning of a stop text, is held back.

    Attributes:
        tokens: all tokens so far, up to the one that completes a stop text.
        text: their text so far, up to the stop text.
        stopped: whether a stop text is complete.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str]) -> None:
        """`before`: the last tokens before these; the first word's space may depend on them."""
        self._tokenizer, self._before, self._stop = tokenizer, list(before), stop
        self._skipped = len(tokenizer.decode(self._before))
        self._shown = 0
        self.tokens: list[int] = []
        self.text, self.stopped = "", False

    def add(self, tokens: Sequence[int]) -> None:
        """Append tokens; those after a stop text are dropped."""
        start = len(self.tokens)
        self.tokens += tokens
        self.text = self._decode(len(self.tokens))
        if self._stop_at(self.text) >= 0:
            self.stopped = True
            end = next(n for n in range(start, len(self.tokens) + 1) if self._stop_at(self._decode(n)) >= 0)
            self.tokens = self.tokens[:end]
            self.text = self._decode(end)
            self.text = self.text[: self._stop_at(self.text)]

    def take(self, last: bool = False) -> str:
        """The text that can no longer change and was not taken before; with `last`, all the rest."""
        certain = self.text if last or self.stopped else self._certain()
        new, self._shown = certain[self._shown :], max(self._shown, len(certain))
        return new

    def _decode(self, count: int) -> str:
        return self._tokenizer.decode(self._before + self.tokens[:count])[self._skipped :]

    def _stop_at(self, text: str) -> int:
        """Where the first stop text in `text` begins, -1 if there is none."""
        return min((at for at in map(text.find, self._stop) if at >= 0), default=-1)

    def _certain(self) -> str:
        """The text without unfinished characters at its end, and without an end that a stop text may begin with."""
        text = self.text.rstrip(UNFINISHED)
        held = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        return text[: len(text) - held]


@dataclass
class Request:
    """One row of the batch.

    Attributes:
        prompt: its text.
        seed: of its noise.
        max_tokens: to generate.
        ends: tokens that end a document.
        tokens: all so far, prompt included, on the grid of chunks.
        stream: the generated text.
        chunks: sampled so far.
        reason: why the request is finished; None while it is not.
    """

    prompt: str
    seed: int
    max_tokens: int
    ends: tuple[int, ...]
    tokens: list[int]
    stream: TextStream
    chunks: list[Chunk] = field(default_factory=list)
    reason: FinishReason | None = None

    def chunk(self, position: int, k: int, pad: int) -> list[int]:
        """The tokens of the chunk at `position`, filled with pad once the request is finished."""
        chunk = self.tokens[position * k : (position + 1) * k]
        return chunk + [pad] * (k - len(chunk))

    def context(self, position: int, k: int) -> Context:
        """What the chunk at `position` is drawn from."""
        return Context(self.seed, self.tokens[: position * k], self.tokens[position * k :])

    def append(self, chunk: Chunk, known: int) -> None:
        """Add a chunk whose first `known` tokens are there already, up to the end of the document, text or length."""
        self.chunks.append(chunk)
        new = chunk.tokens[known:]
        self.tokens += new
        room = self.max_tokens - len(self.stream.tokens)
        length = next((i for i, token in enumerate(new) if token in self.ends), len(new))
        self.stream.add(new[: min(length, room)])
        if self.stream.stopped:
            self.reason = "stop"
        elif length < min(len(new), room):
            self.reason = "eos"
        elif length >= room:
            self.reason = "length"


def new_requests(
    loaded: Loaded,
    prompts: Sequence[str | Sequence[int]],
    options: GenerationOptions,
    seeds: Sequence[int] | None = None,
) -> list[Request]:
    """A request for each prompt, with its seed: `options.seed` and those that follow it where none are given.

    Raises:
        UserError: a prompt is not valid text, or takes more positions with `max_tokens` than the model was trained on.
    """
    require_text([prompt for prompt in prompts if isinstance(prompt, str)])
    tokenizer, k = loaded.tokenizer, loaded.shape.k
    seeds = range(options.seed, options.seed + len(prompts)) if seeds is None else seeds
    requests = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        text = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        tokens = prompt_tokens(text, k, tokenizer, loaded.documents, options.partial)
        positions = -(-(len(tokens) + options.max_tokens) // k) - 1  # the last chunk is not read
        if positions > loaded.positions:
            raise UserError(
                f"a prompt of {len(text)} tokens and max_tokens={options.max_tokens} take {positions} chunks, but the "
                f"model was trained on {loaded.positions}: shorten the prompt or lower max_tokens."
            )
        stream, ends = TextStream(tokenizer, text[-1:], options.stop), loaded.documents.ends(tokenizer)
        shown = prompt if isinstance(prompt, str) else tokenizer.decode(text)
        requests.append(Request(shown, seed, options.max_tokens, ends, tokens, stream))
    return requests


def hidden_states(loaded: Loaded, requests: Sequence[Request]) -> Iterator[tuple[int, Tensor]]:
    """(p, hidden states `[1, R, d]` from which chunk p is drawn) while a request is unfinished.

    First all chunks that every prompt fills, in one pass; then chunk by chunk, of what the requests hold by then.
    """
    k, pad, cache = loaded.shape.k, loaded.tokenizer.pad, KeyValueCache()
    device = next(loaded.model.parameters()).device
    start, end = 0, min((len(request.tokens) // k for request in requests), default=0)
    while any(request.reason is None for request in requests):
        chunks = [[request.chunk(p, k, pad) for p in range(start, end)] for request in requests]
        hidden = loaded.model.hidden(torch.tensor(chunks, device=device), cache)
        yield end, hidden[-1:]
        start, end = end, end + 1
