"""Building token stores: corpus -> token shards, split by document into train and held-out."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from calm_core.config.data_config import DataConfig
from calm_core.data.builder import WHOLE, Share, StoreBuilder, shard_name, spread
from calm_core.data.corpus import (
    EARLY,
    Block,
    Document,
    Source,
    Tally,
    blocks,
    documents,
    fingerprint,
    parts,
    records,
    sources,
)
from calm_core.data.store import token_dtype, write_shard
from calm_core.errors import UserError
from calm_core.manifest import read_manifest
from calm_core.progress import Progress
from calm_core.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 20  # text that a process tokenizes at once

TRAIN, HELD_OUT = "train", "held_out"


def side(text: str, held_out: float) -> str:
    """The split of a document, `train` or `held_out`: a function of its text alone, so it stays as the corpus grows."""
    digest = blake2b(text.encode(), digest_size=8, person=b"held_out").digest()
    return HELD_OUT if int.from_bytes(digest, "little") < held_out * 2**64 else TRAIN


def training_texts(config: DataConfig, megabytes: int) -> Iterator[str]:
    """Text of the train split for a tokenizer to learn from: `megabytes` million characters at most.

    Each file gives an equal share; what a short one leaves of it goes to those after it.

    Raises:
        UserError: if there is no text and malformed records are the reason.
    """
    corpus, tally = sources(config.corpus), Tally()
    left = megabytes * 1_000_000
    for number, source in enumerate(corpus):
        share = left // (len(corpus) - number)
        for document in documents(records(source, config.text_field), config.text_field, tally):
            if share <= 0:
                break
            if side(document.text, config.held_out) == TRAIN:
                text = document.text[:share]
                share, left = share - len(text), left - len(text)
                yield text
    if not tally.kept:
        tally.require(0.0)


@dataclass(frozen=True)
class TokenStoreBuild:
    """A token store in the making. Each document is bos, its tokens and, where `data.eos` says so, eos.

    The parts of the corpus may be shared among processes and machines: the store is the same to the byte.
    """

    config: DataConfig
    tokenizer: Tokenizer
    builder: StoreBuilder
    parts: list[list[Source]]

    @classmethod
    def begin(cls, config: DataConfig, tokenizer: Tokenizer, folder: Path) -> "TokenStoreBuild":
        """Begin the store of a corpus, or go on with it; nothing is written yet.

        Raises:
            UserError: if there is no such corpus, or the folder holds something else.
        """
        corpus = sources(config.corpus)
        made_from = {
            "tokenizer": tokenizer.content_hash,
            "corpus": fingerprint(corpus),
            "data.text_field": config.text_field,
            "data.held_out": config.held_out,
            "data.eos": config.eos,
            "data.shard_bytes": config.shard_bytes,
        }
        files = parts(corpus, config.shard_bytes)
        special = {"pad": tokenizer.pad, "bos": tokenizer.bos, "eos": tokenizer.eos}
        names = [part[0].name for part in files]
        builder = StoreBuilder(folder, "tokens", made_from, names, vocab_size=tokenizer.vocab_size, **special)
        return cls(config, tokenizer, builder, files)

    def run(self, share: Share = WHOLE, workers: int = 1) -> None:
        """Tokenize what is not done yet of a share of the parts.

        Raises:
            UserError: if a file cannot be read, or too many records are malformed.
        """
        tally, size, started = Tally(), 0, time.perf_counter()
        tokenize = partial(_tokenize_block, self.config, self.tokenizer, self.builder)
        mine = [part for part in share.of(range(len(self.parts))) if not self.builder.is_done(part)]
        with Progress("tokenizing", len(mine), "parts") as progress:
            for done in spread(tokenize, self._blocks(mine), workers):
                shown = len(tally.examples)
                tally.add(done.records)
                for example in tally.examples[shown:]:
                    print(f"left out: {example}", file=sys.stderr)
                tally.require(self.config.max_malformed, at_least=EARLY)
                self.builder.add(done.part, done.piece, done.last, done.shards, records=done.records.as_dict())
                size += done.bytes
                rate = size / 1e6 / (time.perf_counter() - started)
                progress.advance(int(done.last), f"{size / 1e6:,.1f} MB of text, {rate:,.1f} MB/s")

    def finish(self) -> dict[str, Any]:
        """Complete the store; its manifest.

        Raises:
            UserError: naming parts that are not done; if too many records are malformed or none holds text.
        """
        tally = Tally()
        for entry in self.builder.entries():
            tally.add(Tally(**entry["records"]))
        tally.require(self.config.max_malformed)
        if not tally.kept:
            self.builder.discard()
            raise UserError(
                f"The corpus ({', '.join(self.config.corpus)}) holds no text: name files that do in data.corpus."
            )
        return self.builder.finish(records=tally.as_dict())

    def _blocks(self, mine: Iterable[int]) -> Iterator[Block]:
        cut = (blocks(part, self.parts[part], self.config.text_field, self.config.shard_bytes) for part in mine)
        return (block for block in chain.from_iterable(cut) if not self.builder.has(block.part, block.piece))


def build_tokens(config: DataConfig, tokenizer: Tokenizer, folder: Path, workers: int = 1) -> dict[str, Any]:
    """Tokenize a whole corpus into a token store; its manifest.

    A store that is finished is left as it is; one that was killed half made is gone on with, and ends the same.

    Raises:
        UserError: if the corpus has no text or cannot be read, or the folder holds something else.
    """
    build = TokenStoreBuild.begin(config, tokenizer, folder)
    if build.builder.is_complete:
        return read_manifest(folder, "tokens")
    build.run(workers=workers)
    return build.finish()


class _Piece(NamedTuple):
    """A block that is tokenized: what the journal notes of it."""

    part: int
    piece: int
    last: bool
    bytes: int
    shards: dict[str, dict[str, Any]]
    records: Tally


def _tokenize_block(config: DataConfig, tokenizer: Tokenizer, builder: StoreBuilder, block: Block) -> _Piece:
    """Write the shards of a block, one for each split among its documents."""
    tally, dtype = Tally(), token_dtype(tokenizer.vocab_size)
    bos, end = np.array([tokenizer.bos], dtype), np.array([tokenizer.eos] if config.eos else [], dtype)
    names, tokens = defaultdict(list), defaultdict(list)
    for batch in _batches(documents(block.records, config.text_field, tally)):
        for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
            split = side(document.text, config.held_out)
            names[split].append(document.name)
            tokens[split].append(np.concatenate([bos, np.asarray(ids).astype(dtype), end]))
    shards = {}
    for split, documents_of_split in tokens.items():
        builder.begin()
        offsets = np.cumsum([0, *map(len, documents_of_split)])
        columns = {
            "tokens": pa.LargeListArray.from_arrays(offsets, np.concatenate(documents_of_split)),
            "document": pa.array(names[split], pa.string()),
        }
        path = builder.folder / shard_name(split, block.part, block.piece)
        rows = len(documents_of_split)
        entry = write_shard(path, columns, {"tokenizer": tokenizer.content_hash})
        shards[split] = {**entry, "rows": rows, "tokens": int(offsets[-1]), "documents": rows}
    return _Piece(block.part, block.piece, block.last, block.bytes, shards, tally)


def _batches(stream: Iterable[Document]) -> Iterator[list[Document]]:
    batch, characters = [], 0
    for document in stream:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
