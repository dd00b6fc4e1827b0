"""The layers of compression and heads, and what sequence parallelism does to their positions."""

from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
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


def column(config: TransformerConfig, inputs: int, outputs: int, bias: bool = True) -> ColumnParallelLinear:
    """A linear layer whose outputs are split between tensor-parallel ranks."""
    return ColumnParallelLinear(inputs, outputs, config=config, init_method=config.init_method, bias=bias)


def row(config: TransformerConfig, inputs: int, outputs: int) -> RowParallelLinear:
    """A linear layer with bias whose inputs are split between tensor-parallel ranks, as `column` leaves them."""
    return RowParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=config.init_method,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
    )


def linear(config: TransformerConfig, inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that every tensor-parallel rank holds whole."""
    return replicate_all(nn.Linear(inputs, outputs, dtype=config.params_dtype), config)


def layer_norm(config: TransformerConfig) -> nn.LayerNorm:
    """A LayerNorm over the hidden width, held whole by every tensor-parallel rank."""
    norm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon, dtype=config.params_dtype)
    return replicate_all(norm, config)
