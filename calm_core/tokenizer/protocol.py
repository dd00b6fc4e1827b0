"""What every tokenizer can do."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """Text to token ids and back. Encoding adds no special tokens, and no text encodes to one."""

    content_hash: str
    """Of the file and all else that decides its tokens."""
    vocab_size: int
    """V: every id is below it, pad included."""
    bos: int
    eos: int
    pad: int
    """Never seen in text: where the file has no such token, one is added at the end of the vocabulary."""

    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text: integers `[tokens]`. One thread: processes share out the work, not this."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are silent."""


LONGEST = 1 << 20  # characters that a library is given at once

SEARCHED = 1 << 16  # characters before that limit in which a place to cut is looked for

SINGLE_SPACE = re.compile(r"(?<=\S) (?=\S)")


def encode_long(encode: Callable[[str], np.ndarray], text: str, longest: int = LONGEST) -> np.ndarray:
    """The tokens of a text of any length, integers `[tokens]`, where `encode` has those of a short one.

    The text is cut at single spaces, over which no token of the usual tokenizers reaches: the tokens are those of the
    whole text. Where there is none to cut at, in a script without spaces, a word may be cut in two.
    """
    if len(text) <= longest:
        return encode(text)
    # A tokenizer that puts a space before any text has the one that a piece begins with already.
    spare = " " if np.array_equal(encode("a b"), np.concatenate([encode("a"), encode("b")])) else ""
    first, *others = _pieces(text, longest)
    return np.concatenate([encode(first), *(encode(piece.removeprefix(spare)) for piece in others)])


def _pieces(text: str, longest: int) -> Iterator[str]:
    """The text in pieces of at most `longest` characters, each but the first beginning at a single space if it can."""
    begin = 0
    while len(text) - begin > longest:
        end = begin + longest
        cuts = SINGLE_SPACE.finditer(text, max(begin + 1, end - SEARCHED), end)
        end = max((cut.start() for cut in cuts), default=end)
        yield text[begin:end]
        begin = end
    yield text[begin:]
