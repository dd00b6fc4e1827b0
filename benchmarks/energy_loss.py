"""Time and peak memory of the energy loss, forward and backward, against the naive broadcast.

The naive form draws its noise per position, forms every target and broadcasts the differences; ours shares the noise
among 16 neighbours. Both draw within the timed part. Time is the median of runs that alternate; memory is the growth
of the peak resident size (`VmHWM` of Linux) of a fresh process over its state before the one measured run.

usage: python benchmarks/energy_loss.py [--runs 9] [--threads 2]
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from calm_core.model.heads.energy_loss import energy_loss

SAMPLES, DRAWS, LATENT, GROUP = 8, 100, 128, 16


def naive(samples: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """The definition, written with broadcasts: mean loss over the positions."""
    targets = mean.unsqueeze(2) + log_std.exp().unsqueeze(2) * torch.randn(*mean.shape[:2], DRAWS, LATENT)
    to_target = (samples.unsqueeze(3) - targets.unsqueeze(2)).norm(dim=-1).mean((2, 3))
    between = (samples.unsqueeze(3) - samples.unsqueeze(2)).norm(dim=-1).sum((2, 3)) / (SAMPLES * (SAMPLES - 1))
    return (2 * to_target - between).mean()


def ours(samples: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """The library's loss with draws shared by 16 positions."""
    noise = torch.randn(-(-len(samples) // GROUP), samples.shape[1], DRAWS, LATENT)
    return energy_loss(samples, mean, log_std, noise).loss.mean()


def problem(positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, mean and log_std for `positions` positions of one sequence."""
    torch.manual_seed(0)
    samples = torch.randn(positions, 1, SAMPLES, LATENT, requires_grad=True)
    return samples, torch.randn(positions, 1, LATENT), torch.full((positions, 1, LATENT), -1.2)


def seconds(loss: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """Wall time of one forward and backward."""
    start = time.perf_counter()
    loss(*inputs).backward()
    return time.perf_counter() - start


def peak_bytes(loss: Callable[..., Tensor], positions: int, threads: int) -> int:
    """Growth of this process's peak memory by one forward and backward; to be run in a fresh process."""
    torch.set_num_threads(threads)
    seconds(loss, problem(GROUP))  # loads the libraries' kernels
    inputs = problem(positions)
    before = resident_peak()
    seconds(loss, inputs)
    return resident_peak() - before


def resident_peak() -> int:
    """This process's peak resident size in bytes (`ru_maxrss` would count the parent's)."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024


def main() -> None:
    """Measure and print one line per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="alternating runs per form (default 9)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    forms = (naive, ours)
    print(f"l={LATENT} N={SAMPLES} M={DRAWS}, {arguments.threads} threads, float32, noise included")
    for positions in (512, 2048):
        inputs = problem(positions)
        runs = [[seconds(form, inputs) for form in forms] for _ in range(arguments.runs + 1)][1:]
        naive_time, our_time = (statistics.median(column) for column in zip(*runs, strict=True))
        memory = []
        for form in forms:  # one process each: a peak never falls again
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                memory.append(pool.apply(peak_bytes, (form, positions, arguments.threads)))
        print(
            f"{positions:5d} positions: naive {naive_time * 1e3:7.1f} ms, ours {our_time * 1e3:6.1f} ms, "
            f"{naive_time / our_time:5.1f} times faster | naive {memory[0] / 2**20:7.1f} MiB, "
            f"ours {memory[1] / 2**20:6.1f} MiB, {memory[0] / max(memory[1], 1):5.1f} times less"
        )


if __name__ == "__main__":
    main()
