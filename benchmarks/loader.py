"""The loader at 1x, 10x and 100x the rows: tokens/s, private memory and start-up time must not depend on them.

The stores are synthetic (K=4, l=128, uint16 tokens and float16 latents), in a temporary folder, 5.8 GB at the default
sizes. They are read once into the page cache, then by new processes as in a training run, each window once per
process. For comparison: copying the same bytes in memory, indexing the rows by arrays, and encoding in place of stored
latents.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import torch

from calm_core.autoencoder.model import Autoencoder
from calm_core.config.model_config import AutoencoderConfig
from calm_core.data.chunks import EncodedStore
from calm_core.data.dataset import Blend, ChunkBatch, TrainingSamples, read_batch
from calm_core.data.order import SampleOrder
from calm_core.data.store import ChunkStore, list_column, write_shard
from calm_core.io import format_version, write_json

K, LATENT, VOCABULARY, HIDDEN = 4, 128, 32_000, 512
POSITIONS, MICRO_BATCH = 2048, 4
SHARD_ROWS = 1 << 20
BYTES_PER_CHUNK = K * 2 + 2 * LATENT * 2
SPECIAL = {"vocab_size": VOCABULARY, "pad": 0, "bos": 1, "eos": 2}


def main() -> None:
    """Make the stores, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="chunks of the 1x store (default: %(default)s)")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 10, 100], help="(default: 1 10 100)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the stores are made and removed (default: the system's)")
    arguments = parser.parse_args()
    with TemporaryDirectory(dir=arguments.folder) as scratch:
        print(f"copy within memory: {copy_speed():.1f} GB/s; a chunk with latents takes {BYTES_PER_CHUNK} bytes")
        for factor in arguments.factors:
            folder = Path(scratch) / f"{factor}x"
            make_chunks(folder, factor * arguments.rows)
            for path in folder.glob("*.arrow"):
                into_page_cache(path)
            for processes in (1, 2):
                report(f"{factor}x", processes, stored, folder, arguments.seconds)
            if factor == 1:
                report("1x, rows by index", 1, by_index, folder, arguments.seconds)
                report("1x, shards opened", 1, opened_each_time, folder, arguments.seconds)
                make_tokens(Path(scratch) / "tokens", arguments.rows * K)
                report("1x, encoded", 1, encoded, Path(scratch) / "tokens", arguments.seconds)


def report(name: str, processes: int, opener: Callable, folder: Path, seconds: float) -> None:
    """Print a line on new processes that read at the same time."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        found = pool.starmap(measure, [(opener, folder, seconds, seed) for seed in range(processes)])
    tokens = sum(one["tokens_per_second"] for one in found)
    first = found[0]
    print(
        f"{name:>18}, {first['rows']:>10,} rows, {processes} process(es): {tokens / 1e6:6.2f}M tokens/s, "
        f"{tokens / (POSITIONS * K):6.0f} samples/s, {1e3 * first['cpu']:5.2f} ms CPU a sample, "
        f"{first['bytes_per_token']:6.1f} bytes/token, {tokens * first['bytes_per_token'] / 1e9:5.2f} GB/s, "
        f"start-up {1e3 * first['start_up']:5.1f} ms, memory {first['anonymous']:+5.0f} MiB private",
        flush=True,
    )


def measure(opener: Callable, folder: Path, seconds: float, seed: int) -> dict[str, float]:
    """Start-up until the first micro-batch, then tokens/s over windows that this process has not read before."""
    before, start = anonymous_mib(), time.perf_counter()
    load, rows, bytes_per_token = opener(folder, seed)
    load(np.arange(MICRO_BATCH))
    start_up, start, cpu = time.perf_counter() - start, time.perf_counter(), time.thread_time()
    windows = min(rows // POSITIONS, 4096)  # at most an epoch: no window twice
    consumed = MICRO_BATCH
    while time.perf_counter() - start < seconds and consumed + MICRO_BATCH <= windows:
        load(np.arange(consumed, consumed + MICRO_BATCH))
        consumed += MICRO_BATCH
    tokens = (consumed - MICRO_BATCH) * POSITIONS * K
    return {
        "rows": rows,
        "start_up": start_up,
        "bytes_per_token": bytes_per_token,
        "cpu": (time.thread_time() - cpu) / max(1, consumed - MICRO_BATCH),
        "tokens_per_second": tokens / (time.perf_counter() - start),
        "anonymous": anonymous_mib() - before,
    }


def stored(folder: Path, seed: int) -> tuple[Callable, int, float]:
    """Stored latents, as a training run reads them."""
    store = ChunkStore(folder, "train", "size")
    samples = TrainingSamples(Blend.of(store), POSITIONS, seed)
    return lambda chosen: read_batch(samples, chosen, chosen), len(store), BYTES_PER_CHUNK / K


def opened_each_time(folder: Path, seed: int) -> tuple[Callable, int, float]:
    """Stored latents of a corpus with so many shards that no sample finds its own still open."""
    store = ChunkStore(folder, "train", "size")
    samples = TrainingSamples(Blend.of(store), POSITIONS, seed)

    def load(chosen: np.ndarray) -> list[ChunkBatch]:
        batches = []
        for sample in chosen:
            store.shard.cache_clear()
            batches.append(read_batch(samples, sample[None], sample[None]))
        return batches

    return load, len(store), BYTES_PER_CHUNK / K


def by_index(folder: Path, seed: int) -> tuple[Callable, int, float]:
    """Rows gathered by an index array, then stacked."""
    store = ChunkStore(folder, "train", "size")
    columns, order = store.shard(0).columns, SampleOrder(len(store) // POSITIONS - 1, seed)

    def load(chosen: np.ndarray) -> dict[str, np.ndarray]:
        rows = order.window(chosen)[:, None] * POSITIONS + np.arange(POSITIONS + 1)
        return {name: np.stack([column[row] for row in rows]) for name, column in columns.items() if name != "document"}

    return load, len(store), BYTES_PER_CHUNK / K


def encoded(folder: Path, seed: int) -> tuple[Callable, int, float]:
    """Tokens, and their latents from an encoder of the paper's size, as a run with data.latents=encode has them."""
    torch.set_num_threads(1)
    autoencoder = Autoencoder(AutoencoderConfig(hidden=HIDDEN, latent=LATENT), VOCABULARY, K).requires_grad_(False)
    autoencoder.tokenizer_hash = "none"
    store = EncodedStore(folder, "train", autoencoder, "size")
    samples = TrainingSamples(Blend.of(store), POSITIONS, seed)

    def load(chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return store.encode(read_batch(samples, chosen, chosen, store.read_columns).tokens)

    return load, len(store), 2.0


def make_chunks(folder: Path, rows: int) -> None:
    """A chunk store of random rows."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    shards = []
    for number, begin in enumerate(range(0, rows, SHARD_ROWS)):
        count = min(SHARD_ROWS, rows - begin)
        latents = draw.integers(0, 15_000, (2, count, LATENT), np.uint16).view(np.float16)
        columns = {
            "tokens": list_column(draw.integers(0, VOCABULARY, (count, K), np.uint16)),
            "mean": list_column(latents[0]),
            "log_std": list_column(latents[1]),
            "document": pa.array(np.zeros(count, np.int32)),
        }
        entry = write_shard(folder / f"train-{number:05d}.arrow", columns, {})
        names = {"document": pa.array(["all"]), "chunks": pa.array([count])}
        sidecar = write_shard(folder / f"train-{number:05d}.documents.arrow", names, {})
        shards.append({**entry, "rows": count, "tokens": count * K, "documents": 1, "sidecar": sidecar})
    made_from = {"tokenizer": "none", "tokens": "none", "autoencoder": "none"}
    make_manifest(folder, "chunks", shards, made_from=made_from, k=K, latent=LATENT, packing="pack")


def make_tokens(folder: Path, tokens: int) -> None:
    """A token store of one document."""
    folder.mkdir()
    values = np.random.default_rng(0).integers(0, VOCABULARY, tokens, np.uint16)
    columns = {"tokens": pa.LargeListArray.from_arrays(np.array([0, tokens]), values), "document": pa.array(["all"])}
    entry = write_shard(folder / "train-00000.arrow", columns, {})
    make_manifest(
        folder, "tokens", [{**entry, "rows": 1, "tokens": tokens, "documents": 1}], made_from={"tokenizer": "none"}
    )


def make_manifest(folder: Path, kind: str, shards: list[dict], **properties: object) -> None:
    """Finish a store."""
    header = {"format_version": format_version(kind), "kind": kind, **SPECIAL, **properties}
    write_json(folder / "manifest.json", {**header, "splits": {"train": {"shards": shards}}})


def into_page_cache(path: Path) -> None:
    """Read a whole file."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(1 << 24)
        while file.readinto(buffer):
            pass


def copy_speed() -> float:
    """GB/s of copying the bytes of a micro-batch in memory, over a range larger than any cache."""
    size = MICRO_BATCH * POSITIONS * BYTES_PER_CHUNK
    source, target = np.ones((64, size // 8)), np.empty(size // 8)
    start = time.perf_counter()
    for row in source:
        target[:] = row
    return source.nbytes / (time.perf_counter() - start) / 1e9


def anonymous_mib() -> float:
    """Private memory of this process, not backed by a file."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


if __name__ == "__main__":
    main()
