"""Tokenizers in sentencepiece's `.model` files, and training one."""

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from calm_core.config.data_config import TokenizerConfig
from calm_core.errors import UserError
from calm_core.io import (
    MANIFEST,
    format_version,
    hash_bytes,
    read_manifest,
    replacing,
    require_same,
    require_writable,
    write_manifest,
)
from calm_core.tokenizer import MAX_CHARACTERS, Tokenizer, encode_long, text_tokens_among

RARE_CHARACTERS = "\U0010fffd \ue000 ☃ ʬ 𒀀"  # that a vocabulary without byte tokens does not have

SLICE_CHARACTERS = 2000  # the trainer's time grows with the length of what it is given at once

KIND = "tokenizer"

ERRORS_ONLY = 2  # sentencepiece's log level


class SentencePieceTokenizer:
    """A sentencepiece model.

    Without a pad, unk takes its role if no text encodes to it, as with byte fallback; otherwise a pad is added.
    """

    def __init__(self, content: bytes, path: str = "the model") -> None:
        """Raises: UserError: if the content is not such a model, or has no bos or eos."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise UserError(
                f"{path} is not a tokenizer: name a sentencepiece .model, a tokenizer.json or a tiktoken rank file."
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


def is_trained(path: Path, made_from: Mapping[str, Any]) -> bool:
    """Whether `train_tokenizer` has already made the tokenizer at `path` from these inputs.

    Raises:
        UserError: if it was made from other inputs, or not by `train_tokenizer`.
    """
    manifest = path.parent / MANIFEST
    if not path.exists():
        return False
    if not manifest.exists():
        raise UserError(f"{path} exists and was not trained here: remove it, or skip this step and use it as it is.")
    require_same(path, read_manifest(path.parent, KIND)["made_from"], made_from)
    return True


def train_tokenizer(
    texts: Iterable[str], config: TokenizerConfig, path: Path, made_from: Mapping[str, Any]
) -> Tokenizer:
    """Train a byte-pair encoding with byte fallback on the texts, and write it to `path`, atomically.

    The text is not normalised, newlines may be part of tokens, and each digit is a token. The same texts give the same
    file. A manifest beside it records what it was made from.

    Raises:
        UserError: if the texts cannot support a vocabulary of this size.
    """
    require_writable(path.parent)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_slices(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            max_sentence_length=1 << 30,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            minloglevel=ERRORS_ONLY,
        )
    except RuntimeError as error:
        raise _sentence(error, config) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(path.parent, {"format_version": format_version(KIND), "kind": KIND, "made_from": dict(made_from)})
    with replacing(path) as temporary:
        temporary.write_bytes(model.getvalue())
    return SentencePieceTokenizer(model.getvalue())


def _slices(texts: Iterable[str]) -> Iterator[str]:
    """The texts in slices that begin at spaces, which tokens contain only at their beginning."""
    for text in texts:
        begin = 0
        while begin < len(text):
            end = text.find(" ", begin + SLICE_CHARACTERS)
            end = len(text) if end < 0 else end
            yield text[begin:end]
            begin = end


def _sentence(error: RuntimeError, config: TokenizerConfig) -> Exception:
    """The user error for a complaint of sentencepiece about the vocabulary; the error itself for any other."""
    if too_high := re.search(r"too high.*<= (\d+)", str(error)):
        return UserError(
            f"tokenizer.vocab_size={config.vocab_size} is more than the corpus supports: "
            f"choose at most {too_high[1]} or give more text."
        )
    if too_low := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return UserError(
            f"tokenizer.vocab_size={config.vocab_size} does not hold the characters of the corpus: choose at least "
            f"{too_low[1]} or lower tokenizer.character_coverage."
        )
    if "sentences_.empty()" in str(error):
        return UserError("The training documents of the corpus hold no text: name files that do in data.corpus.")
    return error
