"""Tokens per second of generation at a temperature: the plain way against ours, one prompt, weights of random numbers.

The plain way reads the whole prefix again for each chunk, decodes every draw to float32 logits, and counts equal
chunks in a Python dictionary. Ours keeps keys and values, and decodes a draw only as long as others agree with it: how
much that saves depends on the draws, so two kinds are measured, of draws that differ and of draws that are all alike.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable

import torch

from calm_core.autoencoder import Autoencoder, AutoencoderConfig
from calm_core.inference.decoding import DrawnTokens
from calm_core.inference.load import Loaded
from calm_core.inference.options import GenerationOptions
from calm_core.inference.sampler import ChunkSampler, Context
from calm_core.model.cache import KeyValueCache
from calm_core.model.calm import CalmModel
from calm_core.model.config import BackboneConfig, HeadConfig, ModelShape
from calm_core.model.megatron import transformer_config
from calm_core.model.parameters import initialize
from calm_core.noise import SampleNoise
from calm_core.parallel.config import ParallelConfig
from calm_core.parallel.topology import distributed

K, LATENT, WIDTH, DRAWS, PREFIX = 4, 128, 256, 200, 32


class Specials:
    """The special tokens, which are all that sampling asks a tokenizer for; random draws are to go on for ever."""

    eos, pad = -2, 0


def random_model(vocabulary: int, spread: float, dtype: torch.dtype) -> Loaded:
    """A model whose draws of a chunk differ by `spread` (0: not at all)."""
    torch.manual_seed(0)
    backbone = BackboneConfig(layers=4, hidden=WIDTH, ffn=688, heads=4)
    shape = ModelShape(backbone, HeadConfig(), vocabulary, K, LATENT)
    model = CalmModel(transformer_config(backbone, ParallelConfig(), dtype), shape).eval()
    initialize([model], std=0.02, seed=0)
    torch.nn.init.normal_(model.head.out_reduce.weight, std=spread)
    autoencoder = Autoencoder(AutoencoderConfig(hidden=WIDTH, latent=LATENT, init_std=0.05), vocabulary, K)
    return Loaded(model, autoencoder.to(dtype).eval(), Specials(), positions=1 << 20)


def plain(loaded: Loaded, chunks: int) -> None:
    """T = 1/2 by the book."""
    tokens = torch.ones(1, PREFIX, K, dtype=torch.int64)
    for position in range(chunks):
        hidden = loaded.model.hidden(tokens)[-1:]
        noise = SampleNoise(0, [position], hidden.device)
        latents = loaded.model.head.sample(hidden, noise, DRAWS)[0, 0]
        draws = loaded.autoencoder.decode(latents).float().argmax(-1)  # [N, K] of [N, K, V]
        counts: Counter[tuple[int, ...]] = Counter()
        for draw in draws:
            counts[tuple(int(token) for token in draw)] += 1
        pairs = {chunk: math.comb(count, 2) for chunk, count in counts.items()}
        if not any(pairs.values()):
            pairs = dict(counts)
        weights = torch.tensor(list(pairs.values()), dtype=torch.float64)
        chosen = list(pairs)[int(weights.multinomial(1))]
        tokens = torch.cat([tokens, torch.tensor(chosen).view(1, 1, K)], 1)


def ours(loaded: Loaded, chunks: int) -> None:
    """The same by `calm_core.inference`."""
    sampler = ChunkSampler(loaded, GenerationOptions(temperature=1 / 2, samples=DRAWS))
    cache, tokens = KeyValueCache(), torch.ones(1, PREFIX, K, dtype=torch.int64)
    for position in range(chunks):
        hidden = loaded.model.hidden(tokens, cache)[-1:]
        [chunk] = sampler.next_chunks(hidden, [Context(0, [])], position)
        tokens = torch.tensor(chunk.tokens).view(1, 1, K)


def seconds(run: Callable[[Loaded, int], None], loaded: Loaded, chunks: int) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run(loaded, chunks)
    return time.perf_counter() - start


def decoded_share(loaded: Loaded) -> float:
    """Of the tokens of all draws of a chunk, those that are decoded at T = 1/2."""
    hidden = loaded.model.hidden(torch.ones(1, PREFIX, K, dtype=torch.int64))[-1:]
    latents = loaded.model.head.sample(hidden, SampleNoise(0, [0], hidden.device), DRAWS)[0]
    drawn = DrawnTokens(loaded.autoencoder, latents, Specials.eos, Specials.pad)
    drawn.agreeing(2, torch.ones(1, dtype=torch.bool))
    return (drawn.tokens >= 0).float().mean().item()


@torch.inference_mode()
def main() -> None:
    """Measure and print; the two ways take turns, the best run of each counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=16, help="chunks generated in a run (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each way (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="ours in bf16, for machines that multiply it natively")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    print(f"T=1/2, N={DRAWS}, K={K}, d={WIDTH}, 4 layers, l={LATENT}, autoencoder {WIDTH}, prompt of {PREFIX} chunks")
    print("     V  draws    decoded  plain tok/s  ours tok/s  ratio")
    with distributed(ParallelConfig()):
        for vocabulary in (4_096, 32_000):
            for kind, spread in (("differ", 1.0), ("alike", 0.0)):
                full, fast = (random_model(vocabulary, spread, kind) for kind in (torch.float32, dtype))
                share = decoded_share(fast)
                times = [
                    (seconds(plain, full, arguments.chunks), seconds(ours, fast, arguments.chunks))
                    for _ in range(arguments.runs)
                ]
                speeds = [arguments.chunks * K / min(column) for column in zip(*times, strict=True)]
                print(
                    f"{vocabulary:6d}  {kind:7s} {share:8.0%}  {speeds[0]:11.1f}  {speeds[1]:10.1f}  "
                    f"{speeds[1] / speeds[0]:5.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
