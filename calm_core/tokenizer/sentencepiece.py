"""Tokenizers in sentencepiece's `.model` files."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import sentencepiece

from calm_core.errors import UserError
from calm_core.io import hash_bytes
from calm_core.tokenizer.base import MAX_CHARACTERS, encode_long, text_tokens_among

RARE_CHARACTERS = "\U0010fffd \ue000 ☃ ʬ 𒀀"  # that a vocabulary without byte tokens does not have


class SentencePieceTokenizer:
    """A sentencepiece model.

    Without a pad, unk takes its role if no text encodes to it, as with byte fallback; otherwise a pad is added.
    """

    def __init__(self, content: bytes, path: str = "the model") -> None:
        """Raises: UserError: if the content is no such model, or lacks bos or eos."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise UserError(
                f"{path} is no tokenizer: name a sentencepiece .model, a tokenizer.json or a tiktoken rank file."
            ) from error
        self._size = self.vocab_size = self._processor.vocab_size()
        self.content_hash = hash_bytes(content)
        self.bos: int = self._processor.bos_id()
        self.eos: int = self._processor.eos_id()
        if min(self.bos, self.eos) < 0:
            raise UserError(f"The tokenizer {path} has no bos or no eos token: choose one that has both.")
        pad = self._processor.pad_id() if self._processor.pad_id() >= 0 else self._processor.unk_id()
        # The library never encodes text to control tokens such as bos and eos, but unknown characters to unk.
        if text_tokens_among([pad], self._processor.encode, [self._processor.id_to_piece(pad), RARE_CHARACTERS]):
            pad = self._size
            self.vocab_size += 1
            self.content_hash = hash_bytes(content + f"{self.bos} {self.eos} {pad}".encode())
        self.pad: int = pad

    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""
        return self._encode(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text."""
        if max(map(len, texts), default=0) > MAX_CHARACTERS:
            return [self._encode(text) for text in texts]
        return self._processor.encode(list(texts), num_threads=1, return_type="numpy")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; control tokens have none.

        `decode(encode(text)) == text` for the tokenizers trained here, unless the text has U+2581 (▁), in which
        sentencepiece writes its spaces.
        """
        return self._processor.decode([token for token in ids if token < self._size])

    def _encode(self, text: str) -> np.ndarray:
        return encode_long(partial(self._processor.encode, return_type="numpy"), text)
