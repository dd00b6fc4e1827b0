"""The layers of compression and heads under tensor and sequence parallelism.

The one place that imports Megatron-core for the heads, and only inside the functions that need it: a plan reads a
head's costs without the seconds that Megatron-core takes to import, and inference, with a `SingleRank` configuration,
runs without it. `model.costs` has the costs of the layers.

A parameter that all tensor-parallel ranks hold whole is marked: under sequence parallelism each rank computes its
gradient from its own positions alone, and the engine sums the gradients of marked parameters over the ranks.
"""

from dataclasses import fields
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calm_core.model import single_rank
from calm_core.model.output_layer import linear_cross_entropy
from calm_core.model.single_rank import SingleRank

if TYPE_CHECKING:
    from calm_core.megatron import TransformerConfig


def embedding(config: "TransformerConfig | SingleRank", rows: int, width: int) -> nn.Module:
    """An embedding table whose rows are divided among tensor-parallel ranks.

    Under sequence parallelism its output is divided by positions, as the parallel matrices expect it.
    """
    if isinstance(config, SingleRank):
        return single_rank.embedding(rows, width, config.params_dtype)
    from calm_core.megatron import VocabParallelEmbedding

    return VocabParallelEmbedding(
        rows,
        width,
        init_method=config.init_method,
        reduce_scatter_embeddings=config.sequence_parallel,
        config=config,
    )


def column(config: "TransformerConfig | SingleRank", inputs: int, outputs: int, bias: bool = True) -> nn.Module:
    """A linear layer whose outputs are divided among tensor-parallel ranks.

    It returns them, and the bias that is still to be added or None: the caller adds it in a kernel with what follows.
    """
    if isinstance(config, SingleRank):
        return replicate_all(single_rank.Linear(inputs, outputs, config.params_dtype, bias), config)
    from calm_core.megatron import ColumnParallelLinear

    return ColumnParallelLinear(
        inputs, outputs, config=config, init_method=config.init_method, bias=bias, skip_bias_add=True
    )


def row(config: "TransformerConfig | SingleRank", inputs: int, outputs: int) -> nn.Module:
    """A linear layer with bias whose inputs are divided among tensor-parallel ranks, as `column` leaves them.

    Like `column`, it returns its outputs and the bias that is still to be added.
    """
    if isinstance(config, SingleRank):
        return replicate_all(single_rank.Linear(inputs, outputs, config.params_dtype), config)
    from calm_core.megatron import RowParallelLinear

    return RowParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=config.init_method,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=True,
    )


def linear(config: "TransformerConfig | SingleRank", inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that every tensor-parallel rank holds whole."""
    return replicate_all(nn.Linear(inputs, outputs, dtype=config.params_dtype), config)


def layer_norm(config: "TransformerConfig | SingleRank") -> nn.LayerNorm:
    """A LayerNorm over the hidden width, held whole by every tensor-parallel rank."""
    norm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon, dtype=config.params_dtype)
    return replicate_all(norm, config)


def replicated(parameter: nn.Parameter, config: "TransformerConfig | SingleRank") -> nn.Parameter:
    """Mark a parameter that all tensor-parallel ranks hold whole."""
    parameter.sequence_parallel = config.sequence_parallel
    return parameter


def replicate_all(module: nn.Module, config: "TransformerConfig | SingleRank") -> nn.Module:
    """Mark every parameter of a plain torch module as held whole by all tensor-parallel ranks."""
    for parameter in module.parameters():
        replicated(parameter, config)
    return module


def own_layers(config: "TransformerConfig | SingleRank") -> "TransformerConfig | SingleRank":
    """The configuration with which a head is whole on each rank and works on its own positions, where `config` asks."""
    if isinstance(config, SingleRank) or not config.replicated_head:
        return config
    return SingleRank(**{field.name: getattr(config, field.name) for field in fields(SingleRank)})


def tensor_group(config: "TransformerConfig | SingleRank") -> tuple[dist.ProcessGroup | None, int]:
    """This rank's tensor-parallel group, and its index in that group; (None, 0) without tensor parallelism."""
    if config.tensor_model_parallel_size == 1:
        return None, 0
    from calm_core.megatron import parallel_state

    return parallel_state.get_tensor_model_parallel_group(), parallel_state.get_tensor_model_parallel_rank()


def all_positions(x: Tensor, config: "TransformerConfig | SingleRank") -> int:
    """The number S of all positions, where `x` `[S', ...]` holds those of this tensor-parallel rank."""
    return x.shape[0] * (config.tensor_model_parallel_size if config.sequence_parallel else 1)


def own_positions(x: Tensor, config: "TransformerConfig | SingleRank") -> Tensor:
    """The rows of `x` `[S, ...]` that this tensor-parallel rank works on: all, or its S/TP."""
    if not config.sequence_parallel:
        return x
    return x.chunk(config.tensor_model_parallel_size, dim=0)[tensor_group(config)[1]]


def gathered_positions(x: Tensor, config: "TransformerConfig | SingleRank") -> Tensor:
    """All rows `[S, ...]`, where `x` `[S', ...]` holds those of this tensor-parallel rank; not for gradients."""
    if not config.sequence_parallel:
        return x
    from calm_core.megatron import gather_from_sequence_parallel_region

    return gather_from_sequence_parallel_region(x.contiguous())


def split_positions(x: Tensor, config: "TransformerConfig | SingleRank") -> Tensor:
    """`own_positions` of what all ranks have computed; backward gathers the gradients of all positions."""
    if not config.sequence_parallel:
        return x
    from calm_core.megatron import scatter_to_sequence_parallel_region

    return scatter_to_sequence_parallel_region(x)


def shared_positions(x: Tensor, config: "TransformerConfig | SingleRank") -> Tensor:
    """All positions `[S, ...]` of `x` `[S', ...]`, for ranks that each compute a part from them.

    The backward pass sums the parts' gradients.
    """
    if config.tensor_model_parallel_size == 1:
        return x
    from calm_core.megatron import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region

    share = gather_from_sequence_parallel_region if config.sequence_parallel else copy_to_tensor_model_parallel_region
    return share(x)


def vocabulary_logits(
    matrix: nn.Module, x: Tensor, vocabulary: int, config: "TransformerConfig | SingleRank"
) -> Tensor:
    """This rank's part of the logits of all positions, float32 `[S, B, V / TP]`; -inf for rows that pad the vocabulary.

    `matrix` is a `column` with a row per token, `x` `[S', B, width]` its input at this rank's own positions.
    """
    return without_padding(matrix(x)[0], vocabulary, config)


def without_padding(logits: Tensor, vocabulary: int, config: "TransformerConfig | SingleRank") -> Tensor:
    """A float32 copy of this rank's part `[..., V / TP]` of logits, -inf for rows that pad the vocabulary."""
    first = tensor_group(config)[1] * logits.shape[-1]
    padding = torch.arange(first, first + logits.shape[-1], device=logits.device) >= vocabulary
    return logits.float().masked_fill(padding, -torch.inf)


def vocabulary_nats(
    matrix: nn.Module,
    x: Tensor,
    tokens: Tensor,
    vocabulary: int,
    config: "TransformerConfig | SingleRank",
    counts: Tensor | None = None,
    *,
    compiled: bool,
) -> Tensor:
    """-log P(token) in nats `[S', B]` float32 of tokens `[S, B]`, from the logits that `vocabulary_logits` describes.

    Their gradient must be proportional to `counts` `[S, B]`, or one number where there are none.

    With sequence parallelism each rank has its part of the logits of all positions, but returns the losses of its own
    positions. So the backward pass gathers the gradients of all losses, and sums those of `x` over the ranks.
    """
    nats = linear_cross_entropy(
        shared_positions(x, config).flatten(0, 1),
        matrix.weight,
        tokens.flatten(),
        counts=None if counts is None else counts.flatten(),
        vocabulary=vocabulary,
        group=tensor_group(config)[0],
        compiled=compiled,
    )
    return split_positions(nats.view_as(tokens), config)
