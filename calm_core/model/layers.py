"""The layers that compression and heads are built of, with the settings all of them share."""

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from calm_core.model.sequence import replicate_all


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
