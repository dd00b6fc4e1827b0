"""Sequence parallelism, as the modules of the model see it.

With `sequence_parallel` each tensor-parallel rank holds S/TP of the positions between the parallel matrices. The
rule for a parameter that every tensor-parallel rank holds whole:

* without sequence parallelism each rank sees all positions, and its gradient is already the whole gradient;
* with it each rank sees its own positions, and the whole gradient is the sum over the ranks.

`replicated` marks such a parameter; the engine does the sum before the optimizer's step.
"""

from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


def replicated(parameter: nn.Parameter, config: TransformerConfig) -> nn.Parameter:
    """Mark a parameter that all tensor-parallel ranks hold whole: see the rule above."""
    parameter.sequence_parallel = config.sequence_parallel
    return parameter


def replicate_all(module: nn.Module, config: TransformerConfig) -> nn.Module:
    """Mark every parameter of a plain torch module as held whole by all tensor-parallel ranks."""
    for parameter in module.parameters():
        replicated(parameter, config)
    return module


def all_positions(x: Tensor, config: TransformerConfig) -> int:
    """The number of positions S of which `x` `[S', ...]` holds this tensor-parallel rank's own."""
    return x.shape[0] * (config.tensor_model_parallel_size if config.sequence_parallel else 1)


def own_positions(x: Tensor, config: TransformerConfig) -> Tensor:
    """The rows of `x` `[S, ...]` that this tensor-parallel rank works on: all, or its S/TP."""
    if not config.sequence_parallel:
        return x
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    return x.chunk(ranks, dim=0)[parallel_state.get_tensor_model_parallel_rank()]


def gathered_positions(x: Tensor, config: TransformerConfig) -> Tensor:
    """All rows `[S, ...]` of which `x` `[S', ...]` holds this tensor-parallel rank's own; not for gradients."""
    return gather_from_sequence_parallel_region(x.contiguous()) if config.sequence_parallel else x
