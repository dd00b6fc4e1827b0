"""Micro-batches through the pipeline by Megatron-core's own schedules (none, 1F1B, interleaved)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calm_core.megatron import MegatronModule, get_forward_backward_func

# The schedules' own protocol: (iterator of micro-batches, model part) -> (output, function of the output).
ForwardStep = Callable[[Iterator[Any], MegatronModule], tuple[Any, Callable[..., Any]]]


@dataclass(frozen=True)
class Pass:
    """The shape of one pass through the schedule: `positions` x `micro_batch` chunks in each micro-batch."""

    positions: int
    micro_batch: int


def forward_backward(
    model_parts: Sequence[MegatronModule], forward_step: ForwardStep, micro_batches: Sequence[Any], shape: Pass
) -> list[Any]:
    """Accumulate the gradients of all micro-batches; the loss functions' results, on the last stage."""
    return _run(model_parts, forward_step, micro_batches, shape, forward_only=False)


def forward_only(
    model_parts: Sequence[MegatronModule], forward_step: ForwardStep, micro_batches: Sequence[Any], shape: Pass
) -> list[Any]:
    """Run micro-batches without gradients.

    A model that is whole on this rank needs no schedule, and no configuration of Megatron-core.

    Returns:
        On the last stage what the output functions return (called with `non_loss_data=True`), in order; else [].
    """
    with torch.no_grad():
        if all(part.first and part.last for part in model_parts):
            [model], remaining = model_parts, iter(micro_batches)
            steps = (forward_step(remaining, model) for _ in micro_batches)
            return [collect(output, non_loss_data=True) for output, collect in steps]
        how = {"forward_only": True, "collect_non_loss_data": True}
        return _run(model_parts, forward_step, micro_batches, shape, **how)


def _run(
    model_parts: Sequence[MegatronModule],
    forward_step: ForwardStep,
    micro_batches: Sequence[Any],
    shape: Pass,
    **how: Any,
) -> list[Any]:
    iterators = [iter(micro_batches) for _ in model_parts]  # every interleaved part reads all micro-batches
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(model_parts) > 1 else iterators[0],
        model=list(model_parts),
        num_microbatches=len(micro_batches),
        seq_length=shape.positions,
        micro_batch_size=shape.micro_batch,
        **how,
    )
