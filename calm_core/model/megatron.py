"""From this project's configuration to Megatron-core's: one `TransformerConfig` for every module of a model."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from calm_core.model.config import BackboneConfig
from calm_core.parallel.config import ParallelConfig


def transformer_config(
    backbone: BackboneConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype = torch.float32,
    split: Sequence[int] = (),
) -> TransformerConfig:
    """The Megatron-core configuration of a model of this shape and layout, weights and activations in `dtype`.

    `split` holds the layers of each part of the pipeline (see `pipeline_split`); a single stage needs none.
    Whether the layout can hold the model is checked before (`layout.check_layout`).
    """
    recompute = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[parallel.recompute]
    interleaved = parallel.virtual > 1
    return TransformerConfig(
        num_layers=backbone.layers,
        hidden_size=backbone.hidden,
        ffn_hidden_size=backbone.ffn,
        num_attention_heads=backbone.heads,
        num_query_groups=backbone.key_value_heads,
        layernorm_epsilon=backbone.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if interleaved else None,
        pipeline_model_parallel_layout=_pipeline_layout(split) if parallel.pipeline > 1 else None,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights are built on the host and moved; their values come from `parameters.initialize`, by global name.
        use_cpu_initialization=True,
        init_method=_leave,
        output_layer_init_method=_leave,
        # Fusions that need Apex, TransformerEngine or a compiler are not taken for granted.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        # With two stages the previous and the next rank are one peer: batched sends of an interleaved schedule
        # are then matched in the wrong order, silently. Overlapped point-to-point sends are ordered.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=False,
        # The output of a stage may still be in flight when its storage would be freed (gloo reads it late).
        deallocate_pipeline_outputs=False,
        **recompute,
    )


def _pipeline_layout(split: Sequence[int]) -> list[list[str]]:
    """What each part of the pipeline holds, in the words of Megatron-core."""
    parts = [["decoder"] * layers for layers in split]
    return [["embedding", *parts[0]], *parts[1:-1], [*parts[-1], "loss"]]


def _leave(weight: torch.Tensor) -> torch.Tensor:
    """An initialisation that leaves the weight as it is."""
    return weight
