"""The layers of compression and heads under tensor and sequence parallelism.

The one place that imports Megatron-core for the heads, and only inside the functions that need it: a plan reads a
head's costs without the seconds that Megatron-core takes to import. `model.costs` has the costs of the layers.

A parameter that all tensor-parallel ranks hold whole is marked: under sequence parallelism each rank computes its
gradient from its own positions alone, and the engine sums the gradients of marked parameters over the ranks.
"""

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig


def column(config: "TransformerConfig", inputs: int, outputs: int, bias: bool = True) -> "ColumnParallelLinear":
    """A linear layer whose outputs are divided among tensor-parallel ranks."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    return ColumnParallelLinear(inputs, outputs, config=config, init_method=config.init_method, bias=bias)


def row(config: "TransformerConfig", inputs: int, outputs: int) -> "RowParallelLinear":
    """A linear layer with bias whose inputs are divided among tensor-parallel ranks, as `column` leaves them."""
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    return RowParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=config.init_method,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
    )


def linear(config: "TransformerConfig", inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that every tensor-parallel rank holds whole."""
    return replicate_all(nn.Linear(inputs, outputs, dtype=config.params_dtype), config)


def layer_norm(config: "TransformerConfig") -> nn.LayerNorm:
    """A LayerNorm over the hidden width, held whole by every tensor-parallel rank."""
    norm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon, dtype=config.params_dtype)
    return replicate_all(norm, config)


def replicated(parameter: nn.Parameter, config: "TransformerConfig") -> nn.Parameter:
    """Mark a parameter that all tensor-parallel ranks hold whole."""
    parameter.sequence_parallel = config.sequence_parallel
    return parameter


def replicate_all(module: nn.Module, config: "TransformerConfig") -> nn.Module:
    """Mark every parameter of a plain torch module as held whole by all tensor-parallel ranks."""
    for parameter in module.parameters():
        replicated(parameter, config)
    return module


def tensor_group() -> tuple[dist.ProcessGroup, int]:
    """This rank's tensor-parallel group, and its index in that group."""
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group(), parallel_state.get_tensor_model_parallel_rank()


def all_positions(x: Tensor, config: "TransformerConfig") -> int:
    """The number of positions S of which `x` `[S', ...]` holds this tensor-parallel rank's own."""
    return x.shape[0] * (config.tensor_model_parallel_size if config.sequence_parallel else 1)


def own_positions(x: Tensor, config: "TransformerConfig") -> Tensor:
    """The rows of `x` `[S, ...]` that this tensor-parallel rank works on: all, or its S/TP."""
    if not config.sequence_parallel:
        return x
    return x.chunk(config.tensor_model_parallel_size, dim=0)[tensor_group()[1]]


def gathered_positions(x: Tensor, config: "TransformerConfig") -> Tensor:
    """All rows `[S, ...]` of which `x` `[S', ...]` holds this tensor-parallel rank's own; not for gradients."""
    if not config.sequence_parallel:
        return x
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    return gather_from_sequence_parallel_region(x.contiguous())


def split_positions(x: Tensor, config: "TransformerConfig") -> Tensor:
    """`own_positions` of what all ranks computed alike; backward gathers the gradients of all positions."""
    if not config.sequence_parallel:
        return x
    from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

    return scatter_to_sequence_parallel_region(x)


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log P(token) in nats `[S, B]` of tokens `[S, B]`, from this rank's logits `[S, B, V / TP]`."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(logits, tokens)
