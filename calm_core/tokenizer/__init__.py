"""Tokenizers: one protocol over three libraries, chosen by the file; training one with sentencepiece."""

from pathlib import Path

from calm_core.errors import UserError
from calm_core.tokenizer.base import Tokenizer
from calm_core.tokenizer.sentencepiece import is_trained, train_tokenizer

__all__ = ["Tokenizer", "is_trained", "load_tokenizer", "train_tokenizer"]


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer in a sentencepiece `.model`, a `tokenizer.json` or a tiktoken rank file, recognized by its content.

    Raises:
        UserError: if it is missing, is none of these, lacks the special tokens, or turns text into them.
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
