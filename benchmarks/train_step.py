"""A whole training step of CALM, against a plain PyTorch implementation of the same network, in one run.

Prints tokens/s, the fraction of this machine's own matrix-product peak, and the ratio. The plain form is what one would
write first: conditioning computed once per sample, target samples and all differences held in memory at once, target
noise drawn for every position, autocast for bf16. Run with `--profile` for a table of the heaviest operators.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from step_time import POSITIONS, SEQUENCES, SHAPE
from torch import Tensor, nn

from calm_core.config.training_config import OptimizerConfig, ParallelConfig
from calm_core.distributed.topology import Topology, distributed
from calm_core.model.noise import SampleNoise
from calm_core.plan import flops
from calm_core.training.hardware import peak_flops


def ours(topology: Topology, dtype: torch.dtype, micro_batch: int, compiled: bool) -> Callable[[], None]:
    """One step of the product: schedule, head, energy loss, ZeRO-1 AdamW."""
    from calm_core.distributed.engine import Engine, Pass
    from calm_core.model.backbone import transformer_config
    from calm_core.model.calm import CalmModel
    from calm_core.model.heads import Target
    from calm_core.model.parameters import initialize

    model = CalmModel(transformer_config(SHAPE.backbone, ParallelConfig(), dtype, compiled=compiled), SHAPE)
    initialize([model], 0.02, seed=0)
    engine = Engine([model.to(topology.device)], OptimizerConfig(), topology)
    tokens, mean, log_std = (x.to(topology.device) for x in data())

    def forward_step(samples, model):
        chosen = next(samples)
        target = Target(*(x[chosen, 1:].transpose(0, 1) for x in (tokens, mean, log_std)))
        output = model(tokens[chosen, :-1], target, SampleNoise(0, chosen.tolist(), topology.device))
        loss = output.loss.mean()
        return loss, lambda loss: (loss, {"loss": loss.detach().clone()})

    micro_batches = torch.arange(SEQUENCES).split(micro_batch)

    def step() -> None:
        engine.forward_backward(forward_step, micro_batches, Pass(POSITIONS, micro_batch))
        engine.step(1e-3, loss=1.0)

    return step


def plain(topology: Topology, dtype: torch.dtype) -> Callable[[], None]:
    """One step of the plain form: one process, autocast, AdamW."""
    torch.manual_seed(0)
    model = Plain().to(topology.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens, mean, log_std = (x.to(topology.device) for x in data())

    def step() -> None:
        with torch.autocast(topology.device.type, dtype=dtype, enabled=dtype == torch.bfloat16):
            samples = model(tokens[:, :-1])
        loss = naive_energy_loss(samples.float(), mean[:, 1:].flatten(0, 1), log_std[:, 1:].flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Random chunks with posteriors: tokens `[B, S + 1, K]`, mean and log_std `[B, S + 1, l]`."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(SHAPE.vocabulary, (SEQUENCES, POSITIONS + 1, SHAPE.k), generator=generator)
    mean = torch.randn(SEQUENCES, POSITIONS + 1, SHAPE.latent, generator=generator)
    return tokens, mean, torch.full_like(mean, -1.2)


def naive_energy_loss(samples: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Energy loss of samples `[N, P, l]` by broadcast differences."""
    draws = mean + log_std.exp() * torch.randn(SHAPE.head.target_samples, *mean.shape, device=mean.device)
    to_target = (samples[:, None] - draws[None]).norm(dim=-1).mean((0, 1))
    between = (samples[:, None] - samples[None]).norm(dim=-1).sum((0, 1))
    count = samples.shape[0]
    return (2 * to_target - between / (count * (count - 1))).mean()


class Plain(nn.Module):
    """Embedding, compression, Llama-like layers and energy head in plain modules."""

    def __init__(self) -> None:
        super().__init__()
        backbone, head = SHAPE.backbone, SHAPE.head
        d = backbone.hidden
        self.embedding = nn.Embedding(SHAPE.vocabulary, d)
        self.compress = nn.Sequential(nn.Linear(SHAPE.k * d, 2 * d), nn.SiLU(), nn.Linear(2 * d, d), nn.LayerNorm(d))
        self.layers = nn.ModuleList(PlainLayer(d, backbone.ffn, backbone.heads) for _ in range(backbone.layers))
        self.norm = nn.RMSNorm(d)
        self.noise_in = nn.Sequential(nn.Linear(head.noise, d), nn.LayerNorm(d))
        self.hidden_in = nn.Sequential(nn.Linear(d, d), nn.LayerNorm(d))
        self.block_norm = nn.LayerNorm(d)
        self.block = nn.Sequential(nn.Linear(2 * d, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU(), nn.Linear(d, 2 * d))
        self.down = nn.Linear(d, d)
        self.out = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.SiLU(), nn.Linear(d, SHAPE.latent))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, S, K]` -> samples `[N, B * S, l]`."""
        x = self.compress(self.embedding(tokens).flatten(-2))
        for layer in self.layers:
            x = layer(x)
        hidden = self.norm(x).flatten(0, 1).expand(SHAPE.head.samples, -1, -1)
        noise = torch.rand(*hidden.shape[:2], SHAPE.head.noise, device=x.device) - 0.5
        x, condition = self.noise_in(noise), self.hidden_in(hidden)
        gate, up = self.block(torch.cat([self.block_norm(x), condition], -1)).chunk(2, -1)
        return self.out(x + self.down(F.silu(gate) * up))


class PlainLayer(nn.Module):
    """A pre-norm transformer layer with rotary attention and SwiGLU."""

    def __init__(self, d: int, ffn: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(d, ffn, bias=False), nn.Linear(d, ffn, bias=False)
        self.down = nn.Linear(ffn, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, d] -> [B, S, d]`."""
        normed = self.norm1(x)
        q, k, v = (w(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(-2))
        normed = self.norm2(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of `[B, heads, S, d_head]`."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * frequency
    first, second = x.chunk(2, -1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def interleaved(steps: dict[str, Callable[[], None]], runs: int) -> dict[str, float]:
    """Median seconds of each step, the contestants taking turns so that a noisy machine is noisy to all."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(runs + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if run:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=SEQUENCES)
    parser.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="auto")
    parser.add_argument("--compile", action="store_true", help="also with parallel.compile=always")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with distributed(ParallelConfig()) as topology:
        from calm_core.distributed.topology import choose_dtype

        dtype = choose_dtype(arguments.precision, topology)
        peak, source = peak_flops(topology.device, dtype)
        steps = {"plain": plain(topology, dtype), "ours": ours(topology, dtype, arguments.micro_batch, compiled=False)}
        if arguments.compile:
            steps["compiled"] = ours(topology, dtype, arguments.micro_batch, compiled=True)
        seconds = interleaved(steps, arguments.runs)
        tokens = SEQUENCES * POSITIONS * SHAPE.k
        work = SEQUENCES * flops.executed_training(SHAPE, POSITIONS)
        print(f"{dtype}, {arguments.threads} threads, peak {peak / 1e9:.0f} GFLOP/s ({source})")
        for name, duration in seconds.items():
            rate, share = tokens / duration, flops.utilisation(work, duration, peak)
            print(f"{name:<8} {duration * 1e3:8.1f} ms  {rate:9.0f} tokens/s  {share:6.1%} of peak")
        for name in list(seconds)[1:]:
            print(f"{name} is {seconds['plain'] / seconds[name]:.2f} times as fast as the plain form")
        if arguments.profile:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                steps["ours"]()
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))


if __name__ == "__main__":
    main()
