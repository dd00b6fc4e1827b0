"""Reduces the gradients of a small network over data-parallel ranks and writes what is sent, and when: `OUT DTYPE`.

OUT/RANK.json takes the bytes that this rank sends, beside those of an all-reduce of the same gradients; for each bucket
the micro-batch in which its reduction begins and the gradients still to come then; and the largest error of the result.
"""

import json
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calm_core.config.training_config import OptimizerConfig, ParallelConfig
from calm_core.distributed.topology import distributed

WIDTH, LAYERS, MICRO_BATCHES = 200, 6, 3
BYTES_SENT = 200  # offset of `tcpi_bytes_sent` in Linux's `struct tcp_info`


def bytes_sent() -> int:
    """What this process has sent through its open TCP connections, as Linux counts it."""
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(descriptor))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # no socket, or of another kind
            continue
        total += struct.unpack_from("Q", info, BYTES_SENT)[0]
    return total


def sent_by(action: Callable[[], object]) -> int:
    """The bytes that this process sends during `action`."""
    dist.barrier()
    before = bytes_sent()
    action()
    return bytes_sent() - before


def gather_gradients(engine: Any) -> None:
    """Let the gradients of this rank's parameters be those that its data-parallel group has reduced into shards."""
    zero = engine.zero
    for whole, shard in zip(zero.fp32_groups_gradients_flat, zero.fp32_groups_gradient_flat_partition, strict=True):
        dist.all_gather_into_tensor(whole, shard.clone(), group=zero.dp_process_group)


def reduced(rank: int, topology: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The record of this rank."""
    from calm_core.distributed.engine import Engine, Pass, Zero
    from calm_core.megatron import MegatronModule, ModelType, TransformerConfig

    class Network(MegatronModule):
        model_type = ModelType.encoder_or_decoder

        def __init__(self) -> None:
            super().__init__(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1))
            torch.manual_seed(0)
            self.net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).to(dtype)

        def set_input_tensor(self, input_tensor: Any) -> None:
            pass

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).float().square().mean()

    network, plain = Network(), Network()
    engine = Engine([network], OptimizerConfig(), topology)
    batches = list(torch.randn(MICRO_BATCHES, 2, WIDTH, generator=torch.Generator().manual_seed(rank)).to(dtype))
    passed: list[Tensor] = []
    begun: list[tuple[int, int]] = []
    begin = Zero._begin_reduction

    def forward_step(micro_batches: Iterator[Tensor], model: Network) -> tuple[Tensor, Callable[[Tensor], Any]]:
        passed.append(next(micro_batches))
        return model(passed[-1]), lambda loss: (loss.clone(), {})

    def watched(zero: Zero, bucket: int) -> None:
        begun.append((len(passed), sum(zero._missing)))
        begin(zero, bucket)

    def reduce() -> None:
        engine.forward_backward(forward_step, batches, Pass(1, 2))
        engine.zero.reduce()

    with patch.object(Zero, "_begin_reduction", watched):
        sent = sent_by(reduce)
    gather_gradients(engine)

    gradients = [torch.zeros(parameter.shape) for parameter in plain.parameters()]
    for x in batches:
        for total, gradient in zip(
            gradients, torch.autograd.grad(plain(x) / MICRO_BATCHES, list(plain.parameters())), strict=True
        ):
            total += gradient
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    all_reduce = sent_by(lambda: dist.all_reduce(flat))
    found = torch.cat([parameter.main_grad.flatten() for parameter in network.parameters()])
    error = ((found * topology.world - flat).abs().max() / flat.abs().max()).item()
    engine.close()
    return {"sent": sent, "all_reduce": all_reduce, "begun": begun, "error": error}


def main(out: Path, dtype: str) -> None:
    with distributed(ParallelConfig(reduce_bucket=2 * WIDTH * WIDTH)) as topology:
        record = reduced(topology.rank, topology, getattr(torch, dtype))
        (out / f"{topology.rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
