"""What the project uses of Megatron-core, imported without what it does not use.

Megatron-core decorates its fused functions by `torch.compile`, and its inference engine imports wandb: both take
seconds in every process. We call none of these functions: `model.pointwise` compiles our own. They stay uncompiled,
and wandb is imported by a run that logs to it.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_UNUSED = ("wandb", "torch.utils.tensorboard")  # Megatron-core works without them


def _as_written(function: Callable | None = None, *_: Any, **__: Any) -> Callable:
    return function or _as_written


@contextmanager
def without_the_unused() -> Iterator[None]:
    """Let `torch.compile` return its argument, and the unused modules be missing, during an import.

    Megatron-core's warnings about optional libraries that are not installed are not shown.
    """
    compile_, missing = torch.compile, [name for name in _UNUSED if name not in sys.modules]
    torch.compile = _as_written
    sys.modules.update(dict.fromkeys(missing))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"megatron\.core")
            yield
    finally:
        torch.compile = compile_
        for name in missing:
            del sys.modules[name]


with without_the_unused():
    from megatron.core import parallel_state
    from megatron.core.enums import ModelType
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        scatter_to_sequence_parallel_region,
    )
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import (
        TransformerBlock,
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
        get_transformer_layer_offset,
    )

__all__ = [
    "MLP",
    "AttnMaskType",
    "ColumnParallelLinear",
    "IdentityOp",
    "MLPSubmodules",
    "MegatronModule",
    "ModelType",
    "ModuleSpec",
    "RowParallelLinear",
    "SelfAttention",
    "SelfAttentionSubmodules",
    "TransformerBlock",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "TransformerLayerSubmodules",
    "VocabParallelEmbedding",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "get_bias_dropout_add",
    "get_forward_backward_func",
    "get_num_layers_to_build",
    "get_transformer_layer_offset",
    "model_parallel_cuda_manual_seed",
    "parallel_state",
    "scatter_to_sequence_parallel_region",
    "without_the_unused",
]
