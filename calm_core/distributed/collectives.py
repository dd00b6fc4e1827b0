"""Collective operations: sums of gradients and metrics, and actions that succeed or fail on all ranks together."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from calm_core.distributed.topology import Topology
from calm_core.errors import UserError
from calm_core.io import may_pass


def reduce_scatter(whole: Tensor, group: dist.ProcessGroup) -> Callable[[], None]:
    """Begin to sum `whole` `[n]` over the ranks of a group, in place: rank r of R receives the r-th of R equal parts.

    A rank sends n (R - 1) / R elements, half of what an all-reduce sends. Collective.

    Returns:
        What waits for the end. Until then nothing may write to `whole`; afterwards its other parts mean nothing.
    """
    size = dist.get_world_size(group)
    own = whole.view(size, -1)[dist.get_rank(group)]
    if size == 1:
        return lambda: None
    if dist.get_backend(group) == "nccl":
        return dist.reduce_scatter_tensor(own, whole, group=group, async_op=True).wait
    received = torch.empty_like(whole)  # gloo's own reduce-scatter is an all-reduce
    work = dist.all_to_all_single(received, whole, group=group, async_op=True)

    def add_up() -> None:
        work.wait()
        torch.sum(received.view(size, -1), 0, out=own)

    return add_up


def average_metrics(micro_batches: Sequence[Mapping[str, Tensor]], topology: Topology) -> dict[str, float]:
    """Per-micro-batch scalars of the last stage -> their mean over the whole batch, on every rank.

    Sequence-parallel ranks hold the sums over their own positions, data-parallel ranks hold means.
    """
    from calm_core.megatron import parallel_state  # takes seconds, which a dry run does not need

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
    from calm_core.megatron import parallel_state

    held = torch.empty(tuple(shape), dtype=torch.int64, device=device) if tokens is None else tokens.contiguous()
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(held, src=source, group=parallel_state.get_pipeline_model_parallel_group())
    return held


T = TypeVar("T")


def on_every_rank(action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank; what it returned on each, in the order of the ranks. Collective.

    Raises:
        UserError: on every rank, if it failed on any by a mistake of the user or of the file system.
        RuntimeError: likewise, if it failed in another way.
    """
    result, failure = None, None
    try:
        result = action()
    except UserError as error:
        failure = type(error), str(error)
    except OSError as error:
        failure = RuntimeError if may_pass(error) else UserError, str(error)
    except Exception as error:
        failure = RuntimeError, f"{type(error).__name__}: {error}"
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, failure))
    for _, failure in outcomes:
        if failure is not None:
            kind, message = failure
            error = kind(message)
            error.on_all_ranks = True
            raise error
    return [result for result, _ in outcomes]


def meet(device: torch.device) -> None:
    """Wait until all ranks have called this. Collective; NCCL waits on a device, and warns where none is named."""
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)


def own_share() -> slice:
    """This rank's share of a list that the ranks divide among them."""
    return slice(dist.get_rank(), None, dist.get_world_size())


def sum_over_ranks(action: Callable[[], np.ndarray], device: torch.device) -> np.ndarray:
    """The sum of the arrays that `action` returns on the ranks. Collective; fails as `on_every_rank`."""
    found: list[np.ndarray] = []
    on_every_rank(lambda: found.append(action()))
    total = torch.from_numpy(found[0]).to(device)
    dist.all_reduce(total)
    return total.cpu().numpy()


def on_first_rank(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 while the others wait; what it returned there. Collective; fails as `on_every_rank`."""
    return on_every_rank(action if dist.get_rank() == 0 else lambda: None)[0]
