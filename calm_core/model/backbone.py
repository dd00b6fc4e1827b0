"""The causal transformer: Megatron-core's layers with our own norm and attention in the layer specification."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_core.config.model_config import BackboneConfig
from calm_core.config.training_config import ParallelConfig
from calm_core.megatron import (
    MLP,
    AttnMaskType,
    ColumnParallelLinear,
    IdentityOp,
    MegatronModule,
    MLPSubmodules,
    ModuleSpec,
    RowParallelLinear,
    SelfAttention,
    SelfAttentionSubmodules,
    TransformerBlock,
    TransformerBlockSubmodules,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
    get_bias_dropout_add,
    get_num_layers_to_build,
)
from calm_core.model.attention import KeyValueCache, RotaryAngles, causal_attention, rotated_heads, rotation
from calm_core.model.layers import all_positions, replicated
from calm_core.model.pointwise import add_rms_norm, fused, rms_norm, swiglu

# Fusions that need Apex or TransformerEngine, and those that our own layers make.
_NO_FUSION = {
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
}

_RECOMPUTE = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@dataclass
class ModelConfig(TransformerConfig):
    """Megatron-core's configuration, and `replicated_head` (see `config.training_config`)."""

    replicated_head: bool = False


def transformer_config(
    backbone: BackboneConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype = torch.float32,
    split: Sequence[int] = (),
    compiled: bool = False,
) -> ModelConfig:
    """The Megatron-core configuration of a model of this shape and layout, weights and activations in `dtype`.

    `split` holds the layers of each model part (see `pipeline_split`); a single stage needs none. `compiled` fuses the
    pointwise work in training (see `model.pointwise`). Call `plan.layout.check_layout` first: it refuses layouts that
    do not fit the model.
    """
    return ModelConfig(
        replicated_head=parallel.head == "replicated",
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
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights are built on the host and moved; `parameters.initialize` sets their values, by global name.
        use_cpu_initialization=True,
        init_method=_keep,
        output_layer_init_method=_keep,
        bias_activation_fusion=compiled,
        **_NO_FUSION,
        **_layout_options(parallel, split),
    )


def _layout_options(parallel: ParallelConfig, split: Sequence[int]) -> dict[str, Any]:
    """The part of the configuration that depends on the layout alone."""
    interleaved = parallel.virtual > 1
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual if interleaved else None,
        "pipeline_model_parallel_layout": _pipeline_layout(split) if parallel.pipeline > 1 else None,
        "sequence_parallel": parallel.sequence,
        # With two stages the previous and the next rank are the same: batched sends of an interleaved schedule are
        # then matched in the wrong order, without an error. Overlapped point-to-point sends are ordered.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "batch_p2p_sync": False,
        # The output of a stage may still be in flight when its storage would be freed (gloo reads it late).
        "deallocate_pipeline_outputs": False,
        **_RECOMPUTE[parallel.recompute],
    }


def _pipeline_layout(split: Sequence[int]) -> list[list[str]]:
    """The contents of each model part, in Megatron-core's notation."""
    parts = [["decoder"] * layers for layers in split]
    return [["embedding", *parts[0]], *parts[1:-1], [*parts[-1], "loss"]]


def _keep(weight: torch.Tensor) -> torch.Tensor:
    """An initialisation that does not change the weight."""
    return weight


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with the constructor that Megatron-core's specification expects.

    Megatron-core's own norm for machines without Apex does not support sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.config, self.eps = config, eps
        self.weight = replicated(nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype)), config)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., d]`."""
        return fused(self, rms_norm)(x, self.weight, self.eps)


class SDPAttention(MegatronModule):
    """Core attention by `causal_attention`.

    Reads Megatron-core's `[S, B, heads, head]` and returns `[S, B, heads * head]`. With `cache` set, the queries are
    the newest positions, and the cache's mask selects the positions that each attends to.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError("the backbone is causal")
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.cache: KeyValueCache | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        """Causal attention of `query` `[S, B, heads, head]` over `key`, `value` `[S, B, groups, head]`."""
        return causal_attention(query, key, value, self.layer_number, self.cache, self.softmax_scale)


class Attention(SelfAttention):
    """Megatron-core's self-attention, its heads split and rotated in one function."""

    def forward(self, hidden: Tensor, turns: Tensor) -> Tensor:
        """`[S, B, d]` -> `[S, B, d]` (S/TP rows if sequence-parallel), by the rotation of all S positions."""
        mixed, _ = self.linear_qkv(hidden)
        heads = fused(self, rotated_heads)(mixed, turns, self.num_query_groups_per_partition)
        again = self.checkpoint_core_attention and self.training
        attend = self._checkpointed_attention_forward if again else self.core_attention
        return self.linear_proj(attend(*heads, None))[0]


class Layer(TransformerLayer):
    """Pre-norm attention and feed-forward network, each added to the residual stream."""

    def forward(self, hidden_states: Tensor, rotary_pos_emb: Tensor, **_: object) -> tuple[Tensor, None]:
        """`[S, B, d]` -> `[S, B, d]` (S/TP rows if sequence-parallel); the names are those that the block uses.

        `rotary_pos_emb` is the rotation of all S positions (see `model.attention.rotation`).
        """
        attended = self.self_attention(self.input_layernorm(hidden_states), rotary_pos_emb)
        norm, mlp = self.pre_mlp_layernorm, self.mlp
        hidden, normed = fused(self, add_rms_norm)(hidden_states, attended, norm.weight, norm.eps)
        inner = fused(self, swiglu)(*mlp.linear_fc1(normed))
        return hidden + mlp.linear_fc2(inner)[0], None


class Backbone(TransformerBlock):
    """The transformer layers of one pipeline stage, with rotary position embedding inside.

    `first` and `last` say whether this stage is at an end of the model; the last one ends in the final norm.
    """

    def __init__(
        self, config: TransformerConfig, rope_base: float, *, first: bool, last: bool, vp_stage: int | None = None
    ) -> None:
        layers = [_layer_spec()] * get_num_layers_to_build(config, vp_stage=vp_stage)
        spec = TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
        super().__init__(config, spec, pre_process=first, post_process=last, vp_stage=vp_stage)
        self.rope = RotaryAngles(config.kv_channels, rope_base)

    def forward(self, hidden: Tensor | None, cache: KeyValueCache | None = None) -> Tensor:
        """Hidden states `[S, B, d]` -> `[S, B, d]` (S/TP rows if sequence-parallel).

        `hidden` is None on a stage that is not the first, whose input is set by `set_input_tensor`. With a cache, the
        new positions follow those in it.
        """
        given = hidden if self.pre_process else self.input_tensor
        positions = all_positions(given, self.config)
        for layer in self.layers:
            layer.self_attention.core_attention.cache = cache
        turns = rotation(self.rope, positions, cache, given.dtype)
        out = super().forward(hidden, attention_mask=None, rotary_pos_emb=turns)
        if cache is not None:
            cache.advance(positions)
        return out


def _layer_spec() -> ModuleSpec:
    attention = ModuleSpec(
        module=Attention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SDPAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    feed_forward = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    return ModuleSpec(
        module=Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=feed_forward,
            mlp_bda=get_bias_dropout_add,
        ),
    )
