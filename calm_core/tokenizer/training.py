"""Training a tokenizer with sentencepiece."""

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from calm_core.config.data_config import TokenizerConfig
from calm_core.errors import UserError
from calm_core.io import replacing, require_writable
from calm_core.manifest import MANIFEST, format_version, read_manifest, require_same, write_manifest
from calm_core.tokenizer.base import Tokenizer
from calm_core.tokenizer.sentencepiece import SentencePieceTokenizer

PIECE_CHARACTERS = 2000  # the trainer's time grows with the length of what it is given at once

KIND = "tokenizer"

ERRORS_ONLY = 2  # sentencepiece's log level


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
            sentence_iterator=_pieces(texts),
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


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """The texts in pieces that begin at spaces, which tokens contain only at their beginning."""
    for text in texts:
        begin = 0
        while begin < len(text):
            end = text.find(" ", begin + PIECE_CHARACTERS)
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
