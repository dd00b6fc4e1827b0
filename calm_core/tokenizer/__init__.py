"""Tokenizers: one protocol over three libraries, chosen by the file; training one by sentencepiece."""

from calm_core.tokenizer.load import load_tokenizer
from calm_core.tokenizer.protocol import Tokenizer
from calm_core.tokenizer.training import is_trained, train_tokenizer

__all__ = ["Tokenizer", "is_trained", "load_tokenizer", "train_tokenizer"]
