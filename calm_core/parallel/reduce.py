"""Small tensors agreed between ranks: losses, metrics, tokens."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from calm_core.parallel.topology import Topology


def average_metrics(micro_batches: Sequence[Mapping[str, Tensor]], topology: Topology) -> dict[str, float]:
    """Per-micro-batch scalars of the last stage -> their mean over the whole batch, on every rank.

    Sequence-parallel ranks hold parts of a sum (their own positions' share), data-parallel ranks hold means.
    """
    message: list[dict[str, float]] = [{}]
    if topology.last:
        names = list(micro_batches[0])
        totals = torch.stack([torch.stack([m[n].float() for m in micro_batches]).mean() for n in names])
        if topology.layout.sequence:
            dist.all_reduce(totals, group=parallel_state.get_tensor_model_parallel_group())
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        message = [dict(zip(names, (totals / topology.data_size).tolist(), strict=True))]
    if topology.layout.pipeline > 1:
        dist.broadcast_object_list(
            message,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return message[0]


def from_last_stage(tokens: Tensor | None, shape: Sequence[int], device: torch.device) -> Tensor:
    """Token ids of this shape that the last pipeline stage holds (`tokens`, None elsewhere), on every stage."""
    held = torch.empty(tuple(shape), dtype=torch.int64, device=device) if tokens is None else tokens.contiguous()
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(held, src=source, group=parallel_state.get_pipeline_model_parallel_group())
    return held
