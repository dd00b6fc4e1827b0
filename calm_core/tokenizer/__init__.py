"""Tokenizers: one protocol over three libraries, chosen by the content of the file."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from calm_core.errors import UserError

MAX_CHARACTERS = 1 << 20  # that a library is given at once

SEARCHED_CHARACTERS = 1 << 16  # before that limit, for a position to cut at

SINGLE_SPACE = re.compile(r"(?<=\S) (?=\S)")


class Tokenizer(Protocol):
    """Text to token ids and back. Encoding adds no control token, and no text encodes to one."""

    content_hash: str
    """Of the file and all else that decides its tokens."""
    vocab_size: int
    """V: every id is below it, pad included."""
    bos: int
    eos: int
    pad: int
    """Never the token of a text: where the file has no such token, one is added at the end of the vocabulary."""

    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text: integers `[tokens]`, computed in one thread."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; control tokens have none."""


def text_tokens_among(tokens: Iterable[int], encode: Callable[[str], Iterable[int]], names: Iterable[str]) -> set[int]:
    """Which of these `tokens` some text encodes to, found by trials with their `names`."""
    trials = [trial for name in names for trial in (name, f"a{name}b", f"a {name} b", f" {name}", f"{name}\n{name}")]
    return set(tokens) & {token for trial in trials for token in encode(trial)}


def encode_long(encode: Callable[[str], np.ndarray], text: str, longest: int = MAX_CHARACTERS) -> np.ndarray:
    """The tokens of a text of any length, integers `[tokens]`, where `encode` gives those of a short one.

    The text is cut at single spaces. The tokens of the usual tokenizers do not cross them, so that the result equals
    the tokens of the whole text. In a script without spaces a word may be cut in two.
    """
    if len(text) <= longest:
        return encode(text)
    # A tokenizer that prepends a space to any text supplies the one that a later slice begins with.
    spare = " " if np.array_equal(encode("a b"), np.concatenate([encode("a"), encode("b")])) else ""
    first, *others = _slices(text, longest)
    return np.concatenate([encode(first), *(encode(other.removeprefix(spare)) for other in others)])


def _slices(text: str, longest: int) -> Iterator[str]:
    """The text in slices of at most `longest` characters, each but the first beginning at a single space if it can."""
    begin = 0
    while len(text) - begin > longest:
        end = begin + longest
        cuts = SINGLE_SPACE.finditer(text, max(begin + 1, end - SEARCHED_CHARACTERS), end)
        end = max((cut.start() for cut in cuts), default=end)
        yield text[begin:end]
        begin = end
    yield text[begin:]


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer in a sentencepiece `.model`, a `tokenizer.json` or a tiktoken rank file, recognized by its content.

    Raises:
        UserError: if it is missing, is none of these, has no special tokens, or turns text into them.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the tokenizer {path}: {error.strerror}; train or name one.") from error
    # Each library is imported only where a file needs it.
    if content.lstrip()[:1] == b"{":
        from calm_core.tokenizer.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer(content, path)
    from calm_core.tokenizer.tiktoken import LINE, RankTokenizer

    if LINE.match(content):
        return RankTokenizer(content, path)
    from calm_core.tokenizer.sentencepiece import SentencePieceTokenizer

    return SentencePieceTokenizer(content, path)
