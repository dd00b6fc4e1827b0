"""Core attention of the backbone, with or without a cache of the positions before."""

import torch.nn.functional as F
from torch import Tensor

from calm_core.model.cache import KeyValueCache


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, layer: int, cache: KeyValueCache | None, scale: float | None = None
) -> Tensor:
    """Attention of `query` `[S, B, heads, head]` over `key` and `value` `[S, B, groups, head]`: `[S, B, heads * head]`.

    Causal by `scaled_dot_product_attention`: FlashAttention on a GPU, a fused kernel on a CPU. With a cache the queries
    are the newest positions; their keys and values are appended to those of this layer, and they attend to the
    positions that the cache makes visible.
    """
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    mask = None
    if cache is not None:
        key, value = cache.extend(layer, key, value)
        mask = cache.visible(query.shape[2], query.device)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.permute(2, 0, 1, 3).flatten(2)
