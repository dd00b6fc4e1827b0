"""Building token stores: corpus -> token shards of the training and the held-out text."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from calm_core.config.data_config import DataConfig
from calm_core.data.builder import WHOLE_TASK, ArrayTask, StoreBuilder, carry_out, recorded_header, shard_name, spread
from calm_core.data.corpus import (
    JUDGED_RECORDS,
    Block,
    Source,
    Tally,
    blocks,
    documents,
    file_groups,
    fingerprint,
    records,
    sources,
)
from calm_core.data.split import Part, Split, choose_split, split_of
from calm_core.data.store import token_dtype, write_shard
from calm_core.errors import UserError
from calm_core.io import read_manifest
from calm_core.progress import Progress
from calm_core.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 20  # text that a process tokenizes at once


def training_texts(config: DataConfig, megabytes: int, split: Split) -> Iterator[str]:
    """Training text of the corpus for a tokenizer to learn from: at most `megabytes` million characters.

    Each file gives an equal fraction; what a short file does not use goes to those after it.

    Raises:
        UserError: if there is no text and malformed records are the reason.
    """
    corpus, tally = sources(config.corpus), Tally()
    left = megabytes * 1_000_000
    for number, source in enumerate(corpus):
        from_file = left // (len(corpus) - number)
        for document in documents(records(source, config.text_field), config.text_field, tally):
            if from_file <= 0:
                break
            if text := split.training_text(document.text)[:from_file]:
                from_file, left = from_file - len(text), left - len(text)
                yield text
    if not tally.kept:
        tally.require(0.0)


@dataclass(frozen=True)
class TokenStoreBuild:
    """The building of a token store. A document is bos, its tokens and, with `data.eos`, eos.

    The inputs are groups of corpus files. Several processes and machines may each do some of them: the store has the
    same bytes as one built by a single process.
    """

    config: DataConfig
    tokenizer: Tokenizer
    split: Split
    builder: StoreBuilder
    groups: list[list[Source]]

    @classmethod
    def begin(
        cls, config: DataConfig, tokenizer: Tokenizer, folder: Path, held_out_tokens: int = 0
    ) -> "TokenStoreBuild":
        """Start the store of a corpus, or continue it; nothing is written yet.

        A store that was started keeps its split; otherwise `choose_split` holds out at least `held_out_tokens` if the
        corpus allows it.

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
        groups = file_groups(corpus, config.shard_bytes)
        properties = {
            "vocab_size": tokenizer.vocab_size,
            "pad": tokenizer.pad,
            "bos": tokenizer.bos,
            "eos": tokenizer.eos,
        }
        started = recorded_header(folder)
        is_started = started is not None and started.get("made_from") == made_from
        split = split_of(started) if is_started else choose_split(config, held_out_tokens)
        if split != Split("document", config.held_out):
            properties["split"] = split.as_dict()
        builder = StoreBuilder(folder, "tokens", made_from, [group[0].name for group in groups], **properties)
        return cls(config, tokenizer, split, builder, groups)

    def run(self, task: ArrayTask = WHOLE_TASK, workers: int = 1) -> None:
        """Tokenize the inputs of a task that are not done yet.

        Raises:
            UserError: if a file cannot be read, or too many records are malformed.
        """
        tally, size, started = Tally(), 0, time.perf_counter()
        tokenize = partial(_tokenize_block, self.config, self.tokenizer, self.split, self.builder)
        todo = [number for number in task.of(range(len(self.groups))) if not self.builder.is_done(number)]
        with Progress("tokenizing", len(todo), "groups of files") as progress:
            for done in spread(tokenize, self._blocks(todo), workers):
                shown = len(tally.examples)
                tally.add(done.records)
                for example in tally.examples[shown:]:
                    print(f"skipped: {example}", file=sys.stderr)
                tally.require(self.config.max_malformed, at_least=JUDGED_RECORDS)
                self.builder.add(done.group, done.number, done.last, done.shards, records=done.records.as_dict())
                size += done.bytes
                rate = size / 1e6 / (time.perf_counter() - started)
                progress.advance(int(done.last), f"{size / 1e6:,.1f} MB of text, {rate:,.1f} MB/s")

    def finish(self) -> dict[str, Any]:
        """Complete the store and return its manifest.

        Raises:
            UserError: naming inputs that are not done; if too many records are malformed or none holds text.
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

    def _blocks(self, groups: Iterable[int]) -> Iterator[Block]:
        read = (blocks(group, self.groups[group], self.config.text_field, self.config.shard_bytes) for group in groups)
        return (block for block in chain.from_iterable(read) if not self.builder.has(block.group, block.number))


def build_tokens(config: DataConfig, tokenizer: Tokenizer, folder: Path, workers: int = 1) -> dict[str, Any]:
    """Tokenize a whole corpus into a token store and return its manifest.

    A finished store is left as it is; one whose build was killed is continued, with the same result.

    Raises:
        UserError: if the corpus has no text or cannot be read, or the folder holds something else.
    """
    build = TokenStoreBuild.begin(config, tokenizer, folder)
    carry_out(build.builder, partial(build.run, workers=workers), build.finish)
    return read_manifest(folder, "tokens")


class _TokenizedBlock(NamedTuple):
    """What the journal records of a tokenized block."""

    group: int
    number: int
    last: bool
    bytes: int
    shards: dict[str, dict[str, Any]]
    records: Tally


def _tokenize_block(
    config: DataConfig, tokenizer: Tokenizer, split: Split, builder: StoreBuilder, block: Block
) -> _TokenizedBlock:
    """Write the shards of a block, one for each side of the split that has text in it."""
    tally, dtype = Tally(), token_dtype(tokenizer.vocab_size)
    bos, eos, none = np.array([tokenizer.bos], dtype), np.array([tokenizer.eos], dtype), np.empty(0, dtype)
    names, tokens = defaultdict(list), defaultdict(list)
    parts = (
        (document.name, part)
        for document in documents(block.records, config.text_field, tally)
        for part in split.parts(document.text)
    )
    for batch in _batches(parts):
        encoded = tokenizer.encode_batch([part.text for _, part in batch])
        for (name, part), ids in zip(batch, encoded, strict=True):
            begin, end = bos if part.begins else none, eos if part.ends and config.eos else none
            names[part.side].append(name)
            tokens[part.side].append(np.concatenate([begin, np.asarray(ids).astype(dtype), end]))
    shards = {}
    for side, documents_of_side in tokens.items():
        builder.begin()
        offsets = np.cumsum([0, *map(len, documents_of_side)])
        columns = {
            "tokens": pa.LargeListArray.from_arrays(offsets, np.concatenate(documents_of_side)),
            "document": pa.array(names[side], pa.string()),
        }
        path = builder.folder / shard_name(side, block.group, block.number)
        rows = len(documents_of_side)
        entry = write_shard(path, columns, {"tokenizer": tokenizer.content_hash})
        shards[side] = {**entry, "rows": rows, "tokens": int(offsets[-1]), "documents": rows}
    return _TokenizedBlock(block.group, block.number, block.last, block.bytes, shards, tally)


def _batches(parts: Iterable[tuple[str, Part]]) -> Iterator[list[tuple[str, Part]]]:
    batch, characters = [], 0
    for name, part in parts:
        batch.append((name, part))
        characters += len(part.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
