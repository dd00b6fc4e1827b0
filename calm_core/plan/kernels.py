"""Kernels of each unit of the model, and the bytes they move, as `model.costs` counts them; a head counts its own."""

from calm_core.config.model_config import ModelShape, padded_vocabulary
from calm_core.model import costs as of
from calm_core.model import token_loss
from calm_core.model.costs import FLOAT32, Kernels, Load
from calm_core.model.heads import head_module


def unit_kernels(shape: ModelShape, load: Load) -> list[Kernels]:
    """Kernels of each unit of `flops.unit_weights` for one micro-batch, a layer's second forward pass included."""
    layer = _layer(shape, load)
    if load.layout.recompute == "full":
        layer += Kernels(
            backward=layer.forward, moved_backward=layer.moved_forward, messages_backward=layer.messages_forward
        )
    mean = Kernels(forward=2)  # of the losses
    last = head_module(shape.head.kind).kernels(shape, load.of_head) + token_loss.kernels(shape, load) + mean
    return [_entrance(shape, load), *[layer] * shape.backbone.layers, last]


def _entrance(shape: ModelShape, load: Load) -> Kernels:
    """Embedding, compression, and the table of the rotary embedding.

    The gradient of the table is as large as the table, written whole and then added to.
    """
    d, k, tensor = shape.backbone.hidden, shape.k, load.layout.tensor
    table = padded_vocabulary(shape.vocabulary) * d * load.width // tensor
    embedded = load.rows * k * d * load.width
    masked = of.pointwise(embedded, embedded, kernels=(7, 2)) if tensor > 1 else Kernels()  # rows of other ranks
    look_up = of.pointwise(2 * embedded, 2 * embedded + table) + of.pointwise(2 * embedded, 0) + masked
    look_up += Kernels(messages_forward=int(tensor > 1), messages_backward=int(load.layout.sequence))
    rotary = Kernels(forward=8 if load.width < FLOAT32 else 7)  # its angles, cosines and sines, once for all layers
    if shape.head.reads_tokens:
        return look_up + rotary
    expanded, reduced = load.split(2 * d), load.whole(d)
    products = of.column_product(load) + of.silu_kernel(load, expanded) + of.row_product(load) + of.bias_kernel(reduced)
    return look_up + rotary + products + of.layer_norm_kernel(reduced)


def _layer(shape: ModelShape, load: Load) -> Kernels:
    """One transformer layer, in the order of its forward pass."""
    backbone = shape.backbone
    d, ffn = backbone.hidden, load.split(backbone.ffn)
    key_value = d // backbone.heads * backbone.key_value_heads
    whole, query, key = load.whole(d), load.split(d), load.split(key_value)
    joint = query + 2 * key
    added = of.pointwise(3 * whole, 3 * whole)  # the residual, and backward its two gradients
    attention = (
        of.rms_norm_kernels(load, d)
        + of.column_product(load)
        + of.fused(load, 2 * joint, 2 * joint, _rotated_heads(query, key))
        + of.pointwise(joint + query, 2 * (joint + query))
        + of.row_product(load)
    )
    feed_forward = (
        of.fused(load, 4 * whole, 4 * whole, added + of.rms_norm_kernels(load, d))
        + of.column_product(load)
        + of.swiglu_kernels(load, ffn, biased=False)
        + of.row_product(load)
        + added
    )
    return attention + feed_forward


def _rotated_heads(query: int, key: int) -> Kernels:
    """The rotation of queries and keys of these bytes, and a copy of the values.

    Half of the features negated, then joined; two products and their sum. Backward likewise; the gradients of queries,
    keys and values are then joined in one tensor.
    """
    rotation = of.pointwise(10 * (query + key), 10 * (query + key), kernels=(10, 10))
    return rotation + of.pointwise(2 * key, 2 * (query + 2 * key))
