"""Memory that lasts on one rank, by closed form: weights, gradients and the optimizer's share (ZeRO-1)."""

from dataclasses import dataclass, replace

from calm_core import flops
from calm_core.flops import Weights
from calm_core.model.config import ModelShape, padded_vocabulary

FLOAT32 = 4
# DeepSpeed stages gradients for their reduction in buckets of at most so many elements (its default).
BUCKET = 500_000_000


@dataclass(frozen=True)
class States:
    """Bytes of a rank that last, whatever it computes.

    Attributes:
        weights: in the precision of the model.
        gradients: accumulated over micro-batches, float32, whole (ZeRO-1).
        optimizer: float32 masters and two moments, shared out to the data-parallel ranks.
        buckets: staging of the gradients' reduction, which is there from the first backward pass on where the weights
            are float32.
        step: what the optimizer's step needs besides, when there are no activations.
    """

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    step: int

    @property
    def held(self) -> int:
        """All that is there during forward and backward passes."""
        return self.weights + self.gradients + self.optimizer + self.buckets


def states(parameters: int, data_size: int, width: int) -> States:
    """The states of a rank of `parameters` weights of `width` bytes, among `data_size` data-parallel ranks."""
    gradients = FLOAT32 * parameters
    bucket = FLOAT32 * min(parameters, BUCKET)
    if width == FLOAT32:
        buckets, step = bucket, FLOAT32 * parameters // data_size if data_size > 1 else 0
    else:
        buckets, step = 0, bucket if parameters <= BUCKET else 0  # a larger tensor is reduced where it lies
    return States(width * parameters, gradients, 3 * FLOAT32 * parameters // data_size, buckets, step)


def padded(shape: ModelShape) -> ModelShape:
    """The shape with the vocabulary that is really allocated."""
    return replace(shape, vocabulary=padded_vocabulary(shape.vocabulary))


def rank_parameters(shape: ModelShape, tensor: int) -> list[int]:
    """Parameters of one of `tensor` ranks, for each piece of the pipeline in the order of `flops.stage_costs`.

    The rules are those of the modules: matrices between parallel regions are shared out, and the biases of those that
    are split by columns; norms, other biases and small matrices are held whole.
    """
    shape = padded(shape)
    d, kind, blocks = shape.backbone.hidden, shape.head.kind, shape.head.block_count(shape.backbone.layers)
    table, compression = flops.embedding(shape), flops.compression(shape)
    in_blocks = blocks * {"energy": 6 * d * d + 3 * d, "diffusion": 2 * d * d + d, "flow": 2 * d * d + d}.get(kind, 0)
    in_output = {"energy": d * d + d + d * shape.latent, "softmax": d * shape.vocabulary}.get(kind, 0)

    def own(whole: Weights, shared: int) -> int:
        return whole.parameters - shared + shared // tensor

    return [
        own(table + compression, table.parameters + compression.matrix + (2 * d if compression.matrix else 0)),
        *[own(flops.layer(shape), flops.layer(shape).matrix)] * shape.backbone.layers,
        own(flops.final_norm(shape) + flops.whole_head(shape), in_blocks + in_output),
    ]
