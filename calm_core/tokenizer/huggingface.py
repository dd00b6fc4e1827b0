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
from calm_core.tokenizer import encode_long, text_tokens_among

NAMES = "tokenizer_config.json"  # published beside the tokenizer.json: the names of bos, eos and pad

# The usual names, for where there is no such file.
BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[BOS]")

EOS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "[EOS]")

PAD = ("<pad>", "<|pad|>", "<|finetune_right_pad_id|>", "[PAD]")

HIDDEN = "\ufdd0{name}\ufdd1{salt}"  # the new name of a control token: noncharacters, and a hash of the file


class HuggingFaceTokenizer:
    """A `tokenizer.json`. Without a bos, eos also begins documents, as for GPT-2; without a pad, one is added.

    Some files turn the text `<s>` into the token of that name. Such tokens are renamed, so that the text is encoded by
    the other tokens.
    """

    def __init__(self, content: bytes, path: Path) -> None:
        """Raises: UserError: if the content is not a tokenizer, no eos is known, or text encodes to control tokens."""
        # The work is divided among processes; the library's threads, as many in each, would contend for the cores.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._tokenizer = _load(content, path)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        names = _names(path.with_name(NAMES))
        eos = _find(vocabulary, names, "eos_token", EOS)
        if eos is None:
            raise UserError(f"{path} names no eos token: put the model's {NAMES}, which names it, next to it.")
        bos = _find(vocabulary, names, "bos_token", BOS)
        pad = _find(vocabulary, names, "pad_token", PAD)
        size = max(vocabulary.values()) + 1
        self.eos: int = eos
        self.bos: int = eos if bos is None else bos
        self.pad: int = size if pad in (None, self.bos, self.eos) else pad
        self.vocab_size: int = max(size, self.pad + 1)
        self.content_hash = hash_bytes(content + f"{self.bos} {self.eos} {self.pad}".encode())
        control = {name: token for name, token in vocabulary.items() if token in (self.bos, self.eos, self.pad)}
        if of_text := text_tokens_among(control.values(), self._raw_ids, control):
            hidden = [name for name, token in control.items() if token in of_text]
            try:
                self._tokenizer = _load(_renamed(content, hidden), path)
            except UserError as error:  # tokens that others are merged from cannot be renamed
                raise _turns_into_control(path, hidden) from error
            if text_tokens_among(control.values(), self._raw_ids, control):
                raise _turns_into_control(path, hidden)
            self.content_hash = hash_bytes(f"{self.content_hash} without {sorted(hidden)}".encode())

    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""
        return self._encode(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text."""
        return [self._encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; control tokens have none."""
        control = {self.bos, self.eos, self.pad}
        return self._tokenizer.decode([token for token in ids if token not in control], skip_special_tokens=True)

    def _encode(self, text: str) -> np.ndarray:
        return encode_long(lambda part: np.array(self._raw_ids(part), np.int32), text)

    def _raw_ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def _load(content: bytes, path: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path} is not a readable tokenizer.json ({error}): name another.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # the text "<s>" is three characters, not the token
    return tokenizer


def _renamed(content: bytes, names: Iterable[str]) -> bytes:
    """The tokenizer.json with these tokens renamed, in the vocabulary and among the added tokens, under their ids."""
    hidden = {name: HIDDEN.format(name=name, salt=hash_bytes(content)) for name in names}
    whole = json.loads(content)
    for token in whole.get("added_tokens", []):
        if token["content"] in hidden:
            token |= {"content": hidden[token["content"]], "special": True}
    vocabulary = whole["model"].get("vocab", {})
    if isinstance(vocabulary, dict):
        whole["model"]["vocab"] = {hidden.get(name, name): token for name, token in vocabulary.items()}
    else:  # Unigram: pairs of token and score
        whole["model"]["vocab"] = [[hidden.get(name, name), score] for name, score in vocabulary]
    return json.dumps(whole).encode()


def _turns_into_control(path: Path, names: Iterable[str]) -> UserError:
    return UserError(
        f"{path} turns the text {' or '.join(map(repr, names))} into a control token of that name: choose another "
        f"tokenizer, or other names in {NAMES}."
    )


def _names(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): fix or remove it.") from error


def _find(vocabulary: Mapping[str, int], names: Mapping[str, Any], key: str, usual: Iterable[str]) -> int | None:
    """The id of the token that `names` calls `key`, or else of the first usual one."""
    if key in names:
        named = names[key]
        return vocabulary.get(named["content"] if isinstance(named, dict) else named)
    return next((vocabulary[name] for name in usual if name in vocabulary), None)
