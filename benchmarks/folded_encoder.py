"""Tokens per second of the frozen encoder with its first layers folded into tables, and of the encoder itself.

Both encode the same chunks, in the batches of `build_chunks.py`. Rates are medians of alternating runs; the largest
difference between the two posteriors is printed too.

usage: python benchmarks/folded_encoder.py [--runs 5] [--threads 2] [--device cpu]
"""

import argparse
import statistics
import time

import torch

from calm_core.autoencoder.model import Autoencoder, FoldedEncoder
from calm_core.config.model_config import AutoencoderConfig
from calm_core.data.chunks import ENCODED_AT_ONCE

VOCAB, K, CONFIG = 32_000, 4, AutoencoderConfig(hidden=512, latent=128)


def seconds(encode: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Wall time of encoding the chunks once."""
    start = time.perf_counter()
    encode(tokens)
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    """Measure and print one line per form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="alternating runs per form (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = Autoencoder(CONFIG, VOCAB, K).to(arguments.device).eval()
    tokens = torch.randint(VOCAB, (ENCODED_AT_ONCE, K), device=arguments.device)
    start = time.perf_counter()
    folded = FoldedEncoder(model)
    made = time.perf_counter() - start
    forms = (model.encode, folded.encode)
    difference = max((one - other).abs().max().item() for one, other in zip(*(f(tokens) for f in forms), strict=True))
    runs = [[seconds(form, tokens) for form in forms] for _ in range(arguments.runs)]
    direct_rate, folded_rate = (tokens.numel() / statistics.median(column) for column in zip(*runs, strict=True))
    print(f"V={VOCAB} hidden={CONFIG.hidden} l={CONFIG.latent} K={K}, {arguments.device}, {arguments.threads} threads")
    print(f"direct {direct_rate:12,.0f} tokens/s")
    print(f"folded {folded_rate:12,.0f} tokens/s, {folded_rate / direct_rate:.1f} times as many")
    print(
        f"largest difference {difference:.1e}; the tables take {made:.1f} s and {4 * K * VOCAB * CONFIG.hidden:,} bytes"
    )


if __name__ == "__main__":
    main()
