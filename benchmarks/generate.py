"""Tokens per second of generation at a temperature, by a plain implementation and by ours: one prompt, random weights.

The plain one reads the whole prefix again for each chunk, decodes every draw to float32 logits, and counts equal
chunks in a Python dictionary. Ours keeps keys and values, decodes a draw only as long as others agree with it, and
compares few of the logits where draws are close together. How much that saves depends on the draws, so three kinds are
measured: draws that differ, draws that are similar but never equal, and the one draw of a head that starts at zero.

Then CALM against an autoregressive model on the same backbone, both by ours: tokens per second, and the memory of the
weights and of keys and values.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch

from calm_core.autoencoder.model import Autoencoder
from calm_core.config.generation_config import GenerationOptions
from calm_core.config.model_config import AutoencoderConfig, BackboneConfig, HeadConfig, ModelShape
from calm_core.inference.decoding import DocumentEnd, DrawnTokens
from calm_core.inference.load_model import Loaded
from calm_core.inference.sampler import ChunkSampler, Context
from calm_core.model.attention import KeyValueCache
from calm_core.model.calm import CalmModel
from calm_core.model.noise import SampleNoise
from calm_core.model.parameters import initialize
from calm_core.model.single_rank import SingleRank

K, LATENT, WIDTH, DRAWS, PREFIX = 4, 128, 256, 200, 32


class Specials:
    """The special tokens, which are all that sampling asks a tokenizer for; random draws must never end a document."""

    eos, pad = -2, 0


def random_model(vocabulary: int, spread: float, dtype: torch.dtype) -> Loaded:
    """A CALM whose draws of a chunk differ by `spread` (0: not at all)."""
    torch.manual_seed(0)
    backbone = BackboneConfig(layers=4, hidden=WIDTH, ffn=688, heads=4)
    shape = ModelShape(backbone, HeadConfig(), vocabulary, K, LATENT)
    model = CalmModel(SingleRank.of(backbone, dtype), shape).eval()
    initialize([model], std=0.02, seed=0)
    torch.nn.init.normal_(model.head.out_reduce.weight, std=spread)
    torch.nn.init.normal_(model.head.out_reduce.bias)  # what they have in common
    autoencoder = Autoencoder(AutoencoderConfig(hidden=WIDTH, latent=LATENT, init_std=0.05), vocabulary, K)
    return Loaded(model, autoencoder.to(dtype).eval(), Specials(), positions=1 << 20)


def baseline(vocabulary: int, dtype: torch.dtype) -> Loaded:
    """An autoregressive model on the same backbone."""
    backbone = BackboneConfig(layers=4, hidden=WIDTH, ffn=688, heads=4)
    shape = ModelShape(backbone, HeadConfig(kind="softmax"), vocabulary, k=1, latent=0)
    model = CalmModel(SingleRank.of(backbone, dtype), shape).eval()
    initialize([model], std=0.02, seed=0)
    return Loaded(model, None, Specials(), positions=1 << 20)


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


def ours(loaded: Loaded, chunks: int, temperature: float = 1 / 2) -> None:
    """The same by `calm_core.inference`, for chunks of any K."""
    k = loaded.shape.k
    sampler = ChunkSampler(loaded, GenerationOptions(temperature=temperature, samples=DRAWS))
    cache, tokens = KeyValueCache(), torch.ones(1, PREFIX * K // k, k, dtype=torch.int64)
    for position in range(chunks):
        hidden = loaded.model.hidden(tokens, cache)[-1:]
        [chunk] = sampler.next_chunks(hidden, [Context(0, [])], position)
        tokens = torch.tensor(chunk.tokens).view(1, 1, k)


def speeds(ways: dict[str, Callable[[], None]], tokens: int, runs: int) -> list[float]:
    """Tokens per second of each way, the best run of each; they take turns, so that a noisy machine is noisy to all."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return [tokens / min(times) for times in seconds.values()]


def megabytes(loaded: Loaded) -> tuple[float, float]:
    """Of the weights, the autoencoder's decoder included, and of the keys and values of 1,000 tokens."""
    backbone, element = loaded.shape.backbone, next(loaded.model.parameters()).element_size()
    decoder = [
        p for name, p in (loaded.autoencoder.named_parameters() if loaded.autoencoder else ()) if "encoder_" not in name
    ]
    weights = sum(p.numel() for p in [*loaded.model.parameters(), *decoder]) * element
    return weights / 1e6, 2 * backbone.layers * backbone.hidden * element * 1000 / loaded.shape.k / 1e6


def decoded_share(loaded: Loaded) -> float:
    """Of the tokens of all draws of a chunk, those that are decoded at T = 1/2."""
    hidden = loaded.model.hidden(torch.ones(1, PREFIX, K, dtype=torch.int64))[-1:]
    latents = loaded.model.head.sample(hidden, SampleNoise(0, [0], hidden.device), DRAWS)[0]
    drawn = DrawnTokens.of(loaded.autoencoder, latents, DocumentEnd((Specials.eos,), Specials.pad))
    drawn.shared_by(2, torch.ones(1, dtype=torch.bool))
    return (drawn.tokens >= 0).float().mean().item()


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=16, help="chunks generated in a run (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each way (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4_096, 32_000])
    parser.add_argument("--bf16", action="store_true", help="ours in bf16, for machines that multiply it natively")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    print(f"T=1/2, N={DRAWS}, K={K}, d={WIDTH}, 4 layers, l={LATENT}, autoencoder {WIDTH}, prompt of {PREFIX} chunks")
    count, runs = arguments.chunks, arguments.runs
    print("     V  draws    decoded  plain tok/s  ours tok/s  ratio")
    for vocabulary in arguments.vocabularies:
        for kind, spread in (("differ", 1.0), ("alike", 0.005), ("same", 0.0)):
            full, fast = (random_model(vocabulary, spread, kind) for kind in (torch.float32, dtype))
            share = decoded_share(fast)
            ways = {"plain": partial(plain, full, count), "ours": partial(ours, fast, count)}
            before, after = speeds(ways, count * K, runs)
            print(
                f"{vocabulary:6d}  {kind:7s} {share:8.0%}  {before:11.1f}  {after:10.1f}  {after / before:5.1f}",
                flush=True,
            )
    print("     V      T   CALM tok/s  AR tok/s  CALM: weights, cache of 1,000 tokens   AR: likewise")
    for vocabulary in arguments.vocabularies:
        calm, ar = random_model(vocabulary, 0.005, dtype), baseline(vocabulary, dtype)
        for name, temperature in (("1", 1.0), ("1/2", 1 / 2)):
            ways = {
                "calm": partial(ours, calm, count, temperature),
                "ar": partial(ours, ar, count * K, temperature),
            }
            one, other = speeds(ways, count * K, runs)
            sizes = [f"{weights:.1f} MB, {cache:.1f} MB" for weights, cache in map(megabytes, (calm, ar))]
            print(
                f"{vocabulary:6d}  {name:>5s}  {one:11.1f}  {other:8.1f}  {sizes[0]:>37s}  {sizes[1]:>14s}",
                flush=True,
            )


if __name__ == "__main__":
    main()
