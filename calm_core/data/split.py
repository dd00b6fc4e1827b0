"""How a corpus is split into training and held-out text: by document, or by position where documents are few.

By document, a hash of its text decides, so that a document stays on its side as the corpus grows. By position, the end
of every document is held out, and some text before it is skipped as a gap.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from math import ceil
from typing import Any, Literal, NamedTuple

from calm_core.config.data_config import DataConfig
from calm_core.config.experiment import Experiment
from calm_core.data.corpus import Tally, corpus_documents, sources

TRAIN, HELD_OUT = "train", "held_out"

FEWEST_DOCUMENTS = 2  # held out by document: fewer would leave the scores without standard errors

MANY_DOCUMENTS = 100  # from here on more documents are held out where data.held_out gives too little text

LARGEST_FRACTION = 0.25  # of the text that is held out where data.held_out gives too little

CHARACTERS_PER_TOKEN = 6  # more than the mean of the usual tokenizers: the text holds at least the tokens wanted

SEARCHED_CHARACTERS = 256 << 20  # a corpus with this much text is split by document without reading on

LONGEST_GAP = 10_000  # characters

WHITE_SPACE = re.compile(r"\s")


class Part(NamedTuple):
    """The text of a document on one side of the split."""

    side: str
    """`train` or `held_out`."""
    text: str
    begins: bool
    """Whether it begins where the document begins."""
    ends: bool
    """Whether it ends where the document ends."""


@dataclass(frozen=True)
class Split:
    """Which text is held out.

    Attributes:
        by: `document`: whole documents, chosen by a hash of their text; `position`: the end of every document.
        fraction: of the documents, or of each document's characters, that is held out.
    """

    by: Literal["document", "position"]
    fraction: float

    def parts(self, text: str) -> list[Part]:
        """A document's text by side: all on one side, or its beginning and its end, with a gap between."""
        if self.by == "document":
            return [Part(HELD_OUT if _hash_fraction(text) < self.fraction else TRAIN, text, True, True)]
        cut = _at_word(text, len(text) - round(len(text) * self.fraction))
        gap = min(LONGEST_GAP, (len(text) - cut) // 4)
        end = _at_word(text, cut - gap)
        parts = [Part(TRAIN, text[:end], True, end == len(text)), Part(HELD_OUT, text[cut:], cut == 0, True)]
        return [part for part in parts if part.text]

    def training_text(self, text: str) -> str:
        """What of a document's text is for training; empty if none is."""
        return "".join(part.text for part in self.parts(text) if part.side == TRAIN)

    def as_dict(self) -> dict[str, Any]:
        """As the manifest records it."""
        return asdict(self)

    def __str__(self) -> str:
        if self.by == "document":
            return f"held out: {self.fraction:.1%} of the documents, chosen by a hash of their text"
        return (
            f"held out: the last {self.fraction:.1%} of every document, with a gap before it "
            "(too few documents to hold out whole ones)"
        )


def split_of(manifest: Mapping[str, Any]) -> Split:
    """The split that the manifest or header of a token store records; none is by document, as data.held_out says."""
    return Split(**manifest.get("split", {"by": "document", "fraction": manifest["made_from"]["data.held_out"]}))


def held_out_tokens(experiment: Experiment) -> int:
    """The tokens that an evaluation in training reads: a micro-batch of the longest windows in each process."""
    data, windows = experiment.data, experiment.evaluation.micro_batch * experiment.pipeline.processes
    if experiment.head.reads_tokens:
        return windows * experiment.training.positions
    return windows * data.k * max(experiment.training.positions, experiment.autoencoder_training.positions)


def choose_split(config: DataConfig, tokens: int = 0) -> Split:
    """The split of a corpus that holds out at least `tokens` tokens, or a quarter of the text where that is less.

    By document, with the fraction `data.held_out`, where that holds out two documents with enough text. Otherwise more
    of the documents where there are a hundred, and the end of every document where there are fewer. The text is read
    until it has shown that the first holds.
    """
    by_document = Split("document", config.held_out)
    if config.held_out == 0:
        return by_document
    wanted = tokens * CHARACTERS_PER_TOKEN
    hashes, lengths, characters = [], [], 0
    held_out_count = held_out_characters = 0
    for document in corpus_documents(sources(config.corpus), config.text_field, Tally()):
        hashes.append(_hash_fraction(document.text))
        lengths.append(len(document.text))
        characters += lengths[-1]
        if hashes[-1] < config.held_out:
            held_out_count += 1
            held_out_characters += lengths[-1]
        is_enough = held_out_count >= FEWEST_DOCUMENTS and held_out_characters >= wanted
        if (is_enough and held_out_count < len(hashes)) or characters >= SEARCHED_CHARACTERS:
            return by_document
    largest = max(LARGEST_FRACTION, config.held_out)
    if len(hashes) < MANY_DOCUMENTS:
        return Split("position", _rounded(min(max(config.held_out, wanted / max(characters, 1)), largest)))
    held_out_characters = 0
    for fraction, length in sorted(zip(hashes, lengths, strict=True)):
        held_out_characters += length
        if fraction >= config.held_out and held_out_characters >= wanted:
            return Split("document", _rounded(min(max(config.held_out, fraction), largest)))
    return Split("document", largest)


def _hash_fraction(text: str) -> float:
    """A number in [0, 1) that follows from the text alone, uniformly distributed over texts."""
    digest = blake2b(text.encode(), digest_size=8, person=b"held_out").digest()
    return int.from_bytes(digest, "little") * 2.0**-64


def _rounded(fraction: float) -> float:
    """The next multiple of 1/10,000: legible, and above the fraction."""
    return (ceil(fraction * 10_000) + 1) / 10_000 if fraction < LARGEST_FRACTION else fraction


def _at_word(text: str, position: int) -> int:
    """The position, or the beginning of the white space that follows it within a few hundred characters."""
    found = WHITE_SPACE.search(text, position, position + 300)
    return found.start() if found else position
