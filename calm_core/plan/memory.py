"""Memory of one rank by closed form: weights, gradients, optimizer (ZeRO-1) and activations.

Activations are counted tensor by tensor: a docstring lists what autograd keeps from the forward to the backward pass of
one micro-batch, each tensor once, with the operation that reads it. "Whole" tensors are d wide on every rank, "split"
ones are divided by width among tensor-parallel ranks (`Load.whole`, `Load.split`). A head counts its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from calm_core.config.model_config import ModelShape, padded_vocabulary
from calm_core.config.training_config import ParallelConfig
from calm_core.model import token_loss
from calm_core.model.costs import FLOAT32, TOKEN, Activations, Load
from calm_core.model.heads import head_module
from calm_core.plan import flops
from calm_core.plan.layout import by_part


@dataclass(frozen=True)
class States:
    """Bytes that a rank always holds.

    Attributes:
        weights: in the precision of the model.
        gradients: accumulated over micro-batches, float32, whole (ZeRO-1).
        optimizer: float32 masters and the optimizer's moments, divided among the data-parallel ranks.
        step: what the reduction of the gradients needs in addition, when there are no activations.
    """

    weights: int
    gradients: int
    optimizer: int
    step: int

    @property
    def held(self) -> int:
        """All that exists during forward and backward passes."""
        return self.weights + self.gradients + self.optimizer


def states(parameters: int, data_size: int, width: int, moments: int) -> States:
    """The states of a rank of `parameters` weights of `width` bytes, among `data_size` data-parallel ranks.

    `moments` is the optimizer's (`OptimizerConfig.moments`).
    """
    gradients = FLOAT32 * parameters
    optimizer = (1 + moments) * FLOAT32 * parameters // data_size
    received = gradients if data_size > 1 and width == FLOAT32 else 0  # on a CPU; NCCL reduces in place
    return States(width * parameters, gradients, optimizer, received)


def padded(shape: ModelShape) -> ModelShape:
    """The shape with the vocabulary that is really allocated."""
    return replace(shape, vocabulary=padded_vocabulary(shape.vocabulary))


def rank_parameters(shape: ModelShape, layout: ParallelConfig) -> list[int]:
    """Parameters of one of the tensor-parallel ranks, for each unit of `flops.unit_weights`."""
    return [unit.on_rank(layout.tensor) for unit in flops.unit_weights(padded(shape), layout)]


def activations(shape: ModelShape, load: Load) -> list[Activations]:
    """Activations of each unit of `flops.unit_weights`."""
    head = head_module(shape.head.kind).activations(shape, load.of_head)
    side = token_loss.activations(shape, load)
    last = Activations(
        head.kept + side.kept, max(head.forward, side.forward), max(head.backward, side.backward), head.gathered
    )
    return [_entrance(shape, load), *[_layer(shape, load)] * shape.backbone.layers, last]


def peak(shape: ModelShape, load: Load, split: Sequence[int], stage: int, micro_batches: int) -> int:
    """Bytes of activations that a stage holds at most, with `split` layers in each model part.

    Walks the stage's schedule, and in every pass the units of a model part, forward or backward.
    """
    parts = by_part(activations(shape, load), split)
    own = parts[stage :: load.layout.pipeline]
    output = load.whole(shape.backbone.hidden)  # kept by a part for the part that reads it
    most = held = 0
    for forward, virtual in schedule(stage, micro_batches, load.layout):
        part = own[virtual]
        if not forward:
            held -= sum(unit.kept for unit in part) + (0 if part is parts[-1] else output)
        inside = 0
        for unit in part:
            most = max(most, held + inside + unit.kept + (unit.forward if forward else unit.backward))
            inside += unit.kept
        if forward:
            held += inside + (0 if part is parts[-1] else output)
    return most + max(unit.gathered for part in own for unit in part)


def schedule(stage: int, micro_batches: int, layout: ParallelConfig) -> Iterator[tuple[bool, int]]:
    """(whether forward, model part) of each pass of a stage in a step: Megatron-core's 1F1B, interleaved or not."""
    stages, virtual = layout.pipeline, layout.virtual
    total = micro_batches * virtual
    warm_up = (stages - stage - 1) * (1 if virtual == 1 else 2) + (virtual - 1) * stages
    ahead = min(warm_up, total)

    def part(index: int) -> int:
        return index % (stages * virtual) // stages

    yield from ((True, part(index)) for index in range(ahead))
    for index in range(total):
        if index + ahead < total:
            yield True, part(index + ahead)
        yield False, virtual - 1 - part(index)


def _entrance(shape: ModelShape, load: Load) -> Activations:
    """Embedding and compression.

    Kept: the token ids; the embeddings of a chunk, K d wide and whole, read by the first matrix; its output of 2 d and
    the result of SiLU, both split, read by SiLU and the second matrix; the output of that, whole, read by the norm. The
    result is counted by the first layer. Alive in addition: the embeddings in the order of the look-up (forward); the
    gradients of the embeddings in both orders (backward). A head that reads tokens has the look-up alone.
    """
    d, k = shape.backbone.hidden, shape.k
    embedded, tokens = load.rows * k * d * load.width, load.rows * k * TOKEN
    if shape.head.reads_tokens:
        return Activations(tokens, forward=embedded)
    kept = tokens + load.whole(k * d) + 2 * load.split(2 * d) + load.whole(d)
    return Activations(kept, embedded, 2 * embedded, load.gathered(k * d))


def _layer(shape: ModelShape, load: Load) -> Activations:
    """One transformer layer with its input.

    Kept, whole: the two norms' inputs (see `Load.rms_norm`) and outputs, which the matrices read. Kept by attention,
    split: rotated queries and keys, and the values, read by the attention kernel (d + 2 kv); its output, read by the
    kernel and the next matrix (d); its logarithms of sums of exponentials, float32, one per head. Kept by the
    feed-forward layer, split: gate and up projection in one tensor (2 ffn), their product (1 ffn) and, unless compiled,
    silu(gate) (1 ffn).

    Backward, in addition: two gradients of the residual stream and two of the feed-forward width. Recomputation of
    attention drops the logarithms and recomputes its output; full recomputation keeps the input alone.
    """
    backbone, recompute = shape.backbone, load.layout.recompute
    d, ffn, head_width = backbone.hidden, backbone.ffn, backbone.hidden // backbone.heads
    key_value = head_width * backbone.key_value_heads
    log_sums = load.rows * backbone.heads * FLOAT32 // load.layout.tensor
    attention = load.split(d + 2 * key_value) + load.split(d) + log_sums
    kept = 2 * (load.rms_norm(d) + load.whole(d)) + attention + load.split((3 if load.compiled else 4) * ffn)
    backward = 2 * load.whole(d) + 2 * load.split(ffn)
    gathered = load.gathered(d)
    if recompute == "full":
        again = kept - load.whole(d)
        return Activations(load.whole(d), again, again + backward, gathered)
    if recompute == "selective":  # the next matrix keeps the output of the attention in any case
        return Activations(kept - log_sums, log_sums, log_sums + load.split(d) + backward, gathered)
    return Activations(kept, 0, backward, gathered)
