"""The share of generated words that occur in the training documents."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from calm_core.config.experiment import SamplesConfig
from calm_core.data.store import TokenStore
from calm_core.evaluation.brier import clustered_mean, interval_factor
from calm_core.evaluation.ngram import BigramModel, bigram_of
from calm_core.inference.generate import generate
from calm_core.inference.load_model import Loaded
from calm_core.tokenizer import Tokenizer

WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class KnownShare:
    """The fraction of generated words that the training documents have.

    Attributes:
        share: of the words.
        standard_error: clustered by text; None of a single text.
        half_interval: half of a 95 % interval, by Student's t.
        words: that were looked up.
    """

    share: float
    standard_error: float | None
    half_interval: float | None
    words: int


def words(text: str, whole: bool = True) -> list[str]:
    """The words of a text, which are its longest runs of letters, in lower case.

    Where the text is not `whole`, the word at its end may have been cut off and is not counted.
    """
    found = list(WORD.finditer(text))
    if found and not whole and found[-1].end() == len(text):
        found.pop()
    return [match[0].lower() for match in found]


def words_of_documents(store: TokenStore, tokenizer: Tokenizer) -> frozenset[str]:
    """All words of the documents of a store."""
    known: set[str] = set()
    for index in range(len(store.shards)):
        shard = store.shard(index)
        tokens = shard.columns["tokens"].reshape(-1)
        for begin, end in pairwise(shard.offsets.tolist()):
            known.update(words(tokenizer.decode(tokens[begin:end].tolist())))
    return frozenset(known)


def known_share(texts: Sequence[Sequence[str]], known: frozenset[str]) -> KnownShare:
    """The fraction of the words of all texts that is in `known`."""
    found = torch.tensor([float(word in known) for text in texts for word in text], dtype=torch.float64)
    text = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(text) for text in texts]))
    result = clustered_mean(found.unsqueeze(1), text)
    error = result.standard_error.item()
    if math.isnan(error):
        return KnownShare(result.mean.item(), None, None, len(found))
    return KnownShare(result.mean.item(), error, interval_factor(len(texts)) * error, len(found))


def count_words(loaded: Loaded, train: TokenStore, config: SamplesConfig, seed: int) -> dict[str, Any]:
    """The share of known words in texts of a model and of the bigram table, at each temperature of `config`.

    `known_words` is the number of different words in the training documents. The temperature is that of whole chunks
    where the model draws chunks, and of single tokens for a softmax head and for the bigram table.
    """
    known, bigram = words_of_documents(train, loaded.tokenizer), bigram_of(train)
    length = loaded.positions * loaded.shape.k
    found = []
    for temperature in config.temperatures:
        own = words_of_model(loaded, config, temperature, seed)
        table = words_of_bigram(bigram, loaded.tokenizer, config.word_texts, length, temperature, seed)
        shares = {"model": known_share(own, known), "bigram": known_share(table, known)}
        found.append({"temperature": temperature} | {name: asdict(share) for name, share in shares.items()})
    return {"known_words": len(known), "temperatures": found}


def words_of_model(loaded: Loaded, config: SamplesConfig, temperature: float, seed: int) -> list[list[str]]:
    """The words of `config.word_texts` texts of a model, each from the beginning of a document on.

    A text is as long as the context that the model was trained on, unless its document ends before.
    """
    length = loaded.positions * loaded.shape.k
    options = replace(config.options(temperature, seed), max_tokens=length)
    texts = generate(loaded, [""] * config.word_texts, options)
    return [words(text.text, whole=text.reason == "eos") for text in texts]


def words_of_bigram(
    model: BigramModel, tokenizer: Tokenizer, texts: int, length: int, temperature: float, seed: int
) -> list[list[str]]:
    """The words of texts of the bigram model, of at most `length` tokens each; the temperature is that of a token."""
    generator = torch.Generator().manual_seed(seed)
    drawn = model.sample(torch.full((texts,), tokenizer.bos), length, temperature, generator).tolist()
    ends = [text.index(tokenizer.eos) if tokenizer.eos in text else length for text in drawn]
    return [words(tokenizer.decode(text[:end]), end < length) for text, end in zip(drawn, ends, strict=True)]
