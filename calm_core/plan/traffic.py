"""Bytes that a rank sends in a step, by closed form: ring algorithms, each byte counted where it leaves."""

from calm_core.activations import Load
from calm_core.flops import training_evaluations
from calm_core.memory import FLOAT32
from calm_core.model.config import ModelShape


def tensor_parallel(shape: ModelShape, load: Load) -> list[int]:
    """Of each piece of the pipeline and each micro-batch, forward and backward, to its tensor-parallel group.

    A matrix split by rows sums its output, one split by columns the gradient of its input. With sequence parallelism
    the sum is a reduce-scatter and an all-gather, as many bytes, and the input of the columns is gathered once more in
    the backward pass. The losses' own exchange, a number a position, is left out.
    """
    layout, backbone, head = load.layout, shape.backbone, shape.head
    d, k, blocks = backbone.hidden, shape.k, head.block_count(backbone.layers)
    samples = training_evaluations(shape)
    rows, columns = {  # widths of the outputs and of the inputs, a position
        "energy": (samples * (2 * blocks * d + shape.latent), blocks * (2 * samples + 1) * d + samples * d),
        "softmax": (0, d),
    }.get(head.kind, (blocks * d, blocks * d))
    entrance = (d, 0) if head.reads_tokens else (k * d + d, k * d)
    layer = (2 * d * (2 if layout.recompute == "full" else 1), 2 * d)
    return [_sent(load, *widths) for widths in (entrance, *[layer] * backbone.layers, (rows, columns))]


def data_parallel(parameters: int, data_size: int, width: int) -> tuple[int, int]:
    """Of a rank in a step: summing the float32 gradients, and gathering the new weights of `width` bytes."""
    return tuple(bytes_each * parameters * (data_size - 1) // data_size for bytes_each in (2 * FLOAT32, width))


def pipeline(shape: ModelShape, load: Load) -> int:
    """Of each micro-batch at each border between stages, in each direction: hidden states, or their gradient."""
    return load.own_rows * shape.backbone.hidden * load.width


def _sent(load: Load, rows: int, columns: int) -> int:
    size, tensor = load.rows * load.width, load.layout.tensor
    again = columns if load.layout.sequence else 0
    return size * (2 * (rows + columns) + again) * (tensor - 1) // tensor
