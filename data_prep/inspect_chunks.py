"""Inspect a chunk store: counts, token and sigma statistics, and sample text beside its reconstruction."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from calm_core.config import command

if TYPE_CHECKING:
    from calm_core.data.store import ChunkStore
    from calm_core.tokenizer import Tokenizer


def inspect() -> None:
    """Print the contents of the store on the command line."""
    parser = command.Parser(description=__doc__)
    parser.add_argument("store", type=Path, help="folder of the chunk store, such as runs/demo/chunks")
    parser.add_argument("--split", default="held_out", help="train or held_out (the default)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer file, to show text")
    parser.add_argument("--autoencoder", type=Path, help="frozen autoencoder, to show its reconstruction beside it")
    parser.add_argument("--start", type=int, default=0, help="first chunk of text to show")
    parser.add_argument("--chunks", type=int, default=64, help="chunks of text to show")
    arguments = parser.parse_args()
    from calm_core.data.store import ChunkStore
    from calm_core.tokenizer import load_tokenizer

    store = ChunkStore(arguments.store, arguments.split)
    print_statistics(store)
    if arguments.tokenizer:
        tokenizer = load_tokenizer(arguments.tokenizer)
        print_text(store, arguments.start, arguments.chunks, tokenizer, arguments.autoencoder)


def print_statistics(store: "ChunkStore") -> None:
    """Counts of the whole split, and statistics of its first rows."""
    from calm_core.data.verification import statistics

    size = sum(shard["bytes"] for shard in store.shards)
    found = statistics(store)
    lengths, sigma = found["document_chunks"], found["sigma"]
    print(f"{store.split:<12}{len(store):,} chunks of {store.k} tokens, {store.document_count:,} documents")
    print(f"files       {len(store.shards):,} shards, {size / 1e6:,.1f} MB, {size / len(store):,.0f} bytes a chunk")
    for name, value in store.manifest["made_from"].items():
        print(f"made from   {name} {value}")
    print(f"\nof the first {found['rows']:,} chunks; ranges are minimum, 10 %, median, 90 %, maximum")
    print(f"documents   {' '.join(f'{length:,.0f}' for length in lengths)} chunks")
    print(f"tokens      {found['tokens_used']:,} of {store.vocab_size:,} in use, {found['pad_fraction']:.2%} pad")
    print(f"mean        {found['mean']:.3f} ± {found['mean_std']:.3f}, maximum {found['mean_abs']:.3f}")
    print(f"sigma       {' '.join(f'{value:.3f}' for value in sigma)}")
    print(f"dimensions  {store.latent}, {found['flat_dimensions']} of them nearly constant")


def print_text(
    store: "ChunkStore", start: int, count: int, tokenizer: "Tokenizer", autoencoder_path: Path | None
) -> None:
    """The text of some chunks; with an autoencoder, beside its reconstruction from their means, and its accuracy."""
    start = min(max(0, start), len(store) - 1)
    rows = store.read(start, min(count, len(store) - start), ("tokens", "mean"))
    print(f"\n{store.document(start)}, from chunk {start:,}:")
    if not autoencoder_path:
        print(tokenizer.decode(rows["tokens"].reshape(-1).tolist()))
        return
    import numpy as np
    import torch

    from calm_core.autoencoder.model import load_autoencoder
    from calm_core.data.verification import side_by_side

    autoencoder = load_autoencoder(autoencoder_path)
    store.require(autoencoder.k, autoencoder.content_hash)
    with torch.inference_mode():
        rebuilt = autoencoder.decode_tokens(torch.from_numpy(rows["mean"].astype(np.float32))).numpy()
    texts = [[tokenizer.decode(chunk.tolist()) for chunk in chunks] for chunks in (rows["tokens"], rebuilt)]
    print(*side_by_side(*texts, shutil.get_terminal_size().columns), sep="\n")
    print(f"\nrebuilt: {np.mean(rebuilt == rows['tokens']):.2%} of these tokens")


if __name__ == "__main__":
    raise SystemExit(command.guard(inspect))
