"""Tokenizers in tiktoken's rank files: a line for each token, its bytes in base64 and its rank.

A rank file contains neither the rule that splits text before its bytes are merged nor the special tokens. Its number
of ranks identifies the family of tokenizers that it belongs to.
"""

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken

from calm_core.errors import UserError
from calm_core.io import hash_bytes

LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")

MAX_SLICE = 400_000  # characters that the library is given at once; this limit and the next are those of Llama's code

MAX_RUN = 25_000  # consecutive characters that are all white space, or none of them

RUN = re.compile(r"\s+|\S+")


@dataclass(frozen=True)
class Family:
    """What all files with this number of ranks have in common; special tokens follow the ranks."""

    split: str
    specials: int
    bos: int
    eos: int


FAMILIES = {
    128_000: Family(  # Llama 3
        split="|".join(
            (
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English endings
                r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, with a sign or space before it
                r"\p{N}{1,3}",  # up to three digits
                r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # signs, to the end of the line
                r"\s*[\r\n]+",
                r"\s+(?!\S)",  # white space except one before a word
                r"\s+",
            )
        ),
        specials=256,
        bos=128_000,
        eos=128_001,
    )
}


class RankTokenizer:
    """A rank file with the special tokens of its family and a pad after them: V is 128,257 for Llama 3."""

    def __init__(self, content: bytes, path: Path) -> None:
        """Raises: UserError: if the ranks are damaged or of no known family."""
        try:
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
        except ValueError as error:
            raise UserError(f"{path} is a damaged tiktoken rank file ({error}): get it again.") from error
        if len(ranks) not in FAMILIES:
            known = ", ".join(f"{count:,}" for count in FAMILIES)
            raise UserError(f"{path} has {len(ranks):,} ranks, of no known tokenizer (known: {known}): choose another.")
        family = FAMILIES[len(ranks)]
        self._ranks = len(ranks)
        self._encoding = tiktoken.Encoding(path.name, pat_str=family.split, mergeable_ranks=ranks, special_tokens={})
        self.content_hash = hash_bytes(content)
        self.bos, self.eos = family.bos, family.eos
        self.pad = self._ranks + family.specials
        self.vocab_size = self.pad + 1

    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""
        return self._encode(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text."""
        return [self._encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; control tokens have none."""
        return self._encoding.decode([token for token in ids if token < self._ranks])

    def _encode(self, text: str) -> np.ndarray:
        # `encode_to_numpy` of the library looks for special tokens and is slower.
        tokens = [np.array(self._encoding.encode_ordinary(part), np.uint32) for part in _slices(text)]
        return tokens[0] if len(tokens) == 1 else np.concatenate([np.empty(0, np.uint32), *tokens])


def _slices(text: str) -> Iterator[str]:
    """The text in slices that hold at most `MAX_SLICE`, and no run longer than `MAX_RUN`."""
    for begin in range(0, len(text), MAX_SLICE):
        part = text[begin : begin + MAX_SLICE]
        last = 0
        if any(_run_length(part, at) > MAX_RUN for at in range(0, len(part), MAX_RUN)):
            for run in RUN.finditer(part):
                for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                    yield part[last:cut]
                    last = cut
        yield part[last:]


def _run_length(text: str, at: int) -> int:
    """The length of the run of the character at `at`; any length above `MAX_RUN` if it is longer."""
    before = text[max(0, at - MAX_RUN) : at + 1][::-1]
    return RUN.match(before).end() + RUN.match(text, at, at + MAX_RUN + 1).end() - at - 1
