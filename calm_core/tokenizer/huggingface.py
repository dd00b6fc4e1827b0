"""Tokenizers in the `tokenizer.json` files of Hugging Face's `tokenizers`."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from calm_core.errors import UserError
from calm_core.io import hash_bytes
from calm_core.tokenizer.protocol import encode_long

NAMES = "tokenizer_config.json"  # beside the tokenizer.json, where a model is published: the names of bos, eos, pad

# The usual names, where there is no such file.
BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[BOS]")

EOS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "[EOS]")

PAD = ("<pad>", "<|pad|>", "<|finetune_right_pad_id|>", "[PAD]")


class HuggingFaceTokenizer:
    """A `tokenizer.json`. Where it has no bos, eos begins documents too, as it does for GPT-2; a pad is added."""

    def __init__(self, content: bytes, path: Path) -> None:
        """Raises: UserError: if the content is no tokenizer, or no eos is known."""
        # Processes share out the work here; the library's threads, as many in each, would contend for the cores.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path} is no tokenizer.json that can be read ({error}): name another.") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # the text "<s>" is three characters, not the token
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        names = _names(path.with_name(NAMES))
        eos = _find(vocabulary, names, "eos_token", EOS)
        if eos is None:
            raise UserError(f"{path} names no eos token: put the model's {NAMES} beside it, which does.")
        bos = _find(vocabulary, names, "bos_token", BOS)
        pad = _find(vocabulary, names, "pad_token", PAD)
        size = max(vocabulary.values()) + 1
        self.eos: int = eos
        self.bos: int = eos if bos is None else bos
        self.pad: int = size if pad in (None, self.bos, self.eos) else pad
        self.vocab_size: int = max(size, self.pad + 1)
        self.content_hash = hash_bytes(content + f"{self.bos} {self.eos} {self.pad}".encode())

    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""
        return self._encode(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text."""
        return [self._encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are silent."""
        return self._tokenizer.decode([token for token in ids if token != self.pad], skip_special_tokens=True)

    def _encode(self, text: str) -> np.ndarray:
        return encode_long(self._encode_piece, text)

    def _encode_piece(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


def _names(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): mend or remove it.") from error


def _find(vocabulary: Mapping[str, int], names: Mapping[str, Any], key: str, usual: Iterable[str]) -> int | None:
    """The id of the token that `names` calls `key`, or else of the first usual one."""
    if key in names:
        named = names[key]
        return vocabulary.get(named["content"] if isinstance(named, dict) else named)
    return next((vocabulary[name] for name in usual if name in vocabulary), None)
