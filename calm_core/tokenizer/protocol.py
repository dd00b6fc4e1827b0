"""What every tokenizer can do."""

from collections.abc import Sequence
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
