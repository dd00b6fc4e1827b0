"""The time of a training step by its parts: what each rank computes, moves, launches and sends, and what overlaps.

A matrix product takes as long as its FLOPs, or as the bytes that it reads and writes where those take longer: with few
inputs or outputs. A GPU works while the host launches the kernels that follow, so a pass takes the longer of the two.
There the gradient of the input of a `column` is summed over the tensor-parallel ranks while that of its weights is
computed (`Kernels.beside`); all other messages are waited for. A CPU does one after the other. Kernels are counted as
`model.costs` does; a head counts its own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

from calm_core.config.experiment import PlanConfig
from calm_core.config.model_config import ModelShape, padded_vocabulary
from calm_core.model import costs, token_loss
from calm_core.model.costs import FLOAT32, Additive, Kernels, Load, Product, Weights
from calm_core.model.heads import head_module
from calm_core.plan import flops
from calm_core.plan.layout import by_part
from calm_core.plan.memory import padded

T = TypeVar("T")


@dataclass(frozen=True)
class Machine:
    """The rates of one rank and its links, in FLOP/s, bytes/s and seconds.

    Attributes:
        matrices: rate of matrix products.
        memory: bytes that kernels read and write.
        launch: time of the host for a kernel.
        message: latency of a collective, besides its bytes.
        node: bytes sent to ranks of the same node.
        network: bytes sent to other nodes.
        node_ranks: ranks of a node.
        asynchronous: whether host and device work at the same time.
    """

    matrices: float
    memory: float
    launch: float
    message: float
    node: float
    network: float
    node_ranks: int
    asynchronous: bool = True

    @classmethod
    def of(cls, plan: PlanConfig) -> "Machine":
        """The machine that a plan describes."""
        return cls(
            matrices=plan.peak_tflops * 1e12 * plan.matrix_share,
            memory=plan.memory_gbs * 1e9,
            launch=plan.launch_us * 1e-6,
            message=plan.collective_us * 1e-6,
            node=plan.node_gbs * 1e9,
            network=plan.network_gbs * 1e9,
            node_ranks=plan.node_devices,
        )

    def products(self, products: Iterable[Product]) -> float:
        """Seconds of matrix products, each by its FLOPs or by its bytes."""
        return sum(max(each.flops / self.matrices, each.moved / self.memory) for each in products)

    def link(self, size: int, stride: int) -> float:
        """Bytes/s that a rank of a group sends, for a group of `size` ranks that are `stride` apart.

        A group within a node uses the node's links. A ring over nodes enters and leaves each node once, by the network
        devices of all the group's ranks in it.
        """
        together = max(1, min(size, self.node_ranks // stride))
        return self.node if together >= size else min(self.node, self.network * together)


@dataclass(frozen=True)
class StepTime(Additive):
    """Seconds of a step by cause; they add up to the step.

    Attributes:
        matrices: matrix products.
        memory: kernels that are bound by memory.
        host: launches that the device waits for.
        tensor: messages of the tensor-parallel group that nothing hides, with the sum of a replicated head's gradients.
        bubble: waiting for other pipeline stages.
        borders: messages between pipeline stages.
        gradients: sum of the gradients over the data-parallel group, the part that nothing hides.
        weights: gathering the new weights.
        update: norm, clipping and the optimizer.
    """

    matrices: float = 0.0
    memory: float = 0.0
    host: float = 0.0
    tensor: float = 0.0
    bubble: float = 0.0
    borders: float = 0.0
    gradients: float = 0.0
    weights: float = 0.0
    update: float = 0.0

    @property
    def total(self) -> float:
        """Of the step."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Sent(Additive):
    """Bytes that a rank sends to its tensor-parallel group for a unit of the model in one micro-batch.

    Attributes:
        forward: in the forward pass.
        backward: in the backward pass.
        beside: those of `backward` that belong to `Kernels.beside`.
    """

    forward: int = 0
    backward: int = 0
    beside: int = 0


@dataclass(frozen=True)
class UnitWork:
    """What a rank does for a unit of the model in one micro-batch."""

    kernels: Kernels
    sent: Sent


def unit_work(shape: ModelShape, load: Load) -> list[UnitWork]:
    """The work of each unit of `flops.unit_weights` on one of the tensor-parallel ranks."""
    return [UnitWork(*each) for each in zip(unit_kernels(shape, load), unit_messages(shape, load), strict=True)]


def unit_messages(shape: ModelShape, load: Load) -> list[Sent]:
    """What a rank sends to its tensor-parallel group for each micro-batch, by unit.

    The ranks sum the output of a `row`, and the gradient of the input of a `column`. With sequence parallelism a sum is
    a reduce-scatter and an all-gather, as many bytes, and the input of a `column` is gathered again in the backward
    pass, unless its gradient is known by then. The losses' own exchange, a number per position, is omitted.
    """
    entrance, *layers, _ = flops.unit_weights(shape)
    head = head_module(shape.head.kind).costs(shape).training_weights
    head = head.replicated if load.layout.head == "replicated" else head
    sent = [_sent(load, load.rows, unit) for unit in (entrance, *layers, head)]
    if load.layout.recompute == "full":  # the second forward pass sends again what the first one did
        sent[1:-1] = [each + Sent(backward=each.forward) for each in sent[1:-1]]
    if shape.token_loss:
        sent[-1] += _sent(load, load.rows // shape.token_loss.every, token_loss.applied(shape))
    return sent


def _sent(load: Load, rows: int, weights: Weights) -> Sent:
    tensor, outputs, inputs = load.layout.tensor, weights.summed_outputs, weights.summed_inputs
    beside = 2 * (inputs - weights.gathered_once)
    widths = (2 * outputs, 2 * inputs, beside)
    if load.layout.sequence:
        widths = (outputs + inputs, outputs + 2 * inputs - weights.gathered_once, beside)
    return Sent(*(rows * load.width * width * (tensor - 1) // tensor for width in widths))


def forward_pass(machine: Machine, load: Load, units: Sequence[UnitWork]) -> StepTime:
    """The forward pass of one micro-batch through these units."""
    return _pass(machine, load, units, forward=True)


def stage_pass(machine: Machine, load: Load, units: Sequence[UnitWork]) -> StepTime:
    """The forward and the backward pass of one micro-batch through a stage."""
    return forward_pass(machine, load, units) + _pass(machine, load, units, forward=False)


def _pass(machine: Machine, load: Load, units: Sequence[UnitWork], *, forward: bool) -> StepTime:
    kernels, sent = sum((unit.kernels for unit in units), Kernels()), sum((unit.sent for unit in units), Sent())
    which, link = "forward" if forward else "backward", machine.link(load.layout.tensor, 1)
    host = getattr(kernels, which) * machine.launch
    products = machine.products(getattr(kernels, f"products_{which}"))
    moved = getattr(kernels, f"moved_{which}") / machine.memory
    latency = getattr(kernels, f"messages_{which}") * machine.message
    tensor = getattr(sent, which) / link + latency
    if not machine.asynchronous:
        return StepTime(matrices=products, memory=moved, host=host, tensor=tensor)
    if not forward:
        beside = sent.beside / link + len(kernels.beside) * machine.message
        tensor -= min(beside, machine.products(kernels.beside))
    late = host + latency - products - moved - tensor
    return StepTime(matrices=products, memory=moved, host=max(0.0, late), tensor=tensor)


def accumulation_pass(machine: Machine, load: Load, parameters: int, tensors: int) -> StepTime:
    """Adding a micro-batch's gradients of `parameters` weights to those before, which are float32."""
    moved = (load.width + 2 * FLOAT32) * parameters
    return StepTime(memory=moved / machine.memory, host=_late(machine, tensors, moved))


def update_time(
    machine: Machine,
    load: Load,
    parameters: int,
    last: int,
    data_size: int,
    last_backward: float,
    replicated: int = 0,
) -> StepTime:
    """What follows the last backward pass: the sum of the gradients, the update, and the gathering of new weights.

    Args:
        machine: the rates.
        load: of a rank.
        parameters: of a rank.
        last: those whose gradients are complete when the backward pass ends, so that nothing hides their sum.
        data_size: data-parallel ranks.
        last_backward: seconds of the backward pass of the last micro-batch, which hides the other sums on a GPU.
        replicated: parameters whose gradients the tensor-parallel ranks sum first, each having its own positions.
    """
    gradients_sent, weights_sent = data_parallel_traffic(parameters, data_size, load.width)
    last_sent, _ = data_parallel_traffic(last + replicated, data_size, load.width)
    link, tensor = machine.link(data_size, load.layout.tensor), load.layout.tensor
    message = machine.message if data_size > 1 else 0.0
    summed, gathered = gradients_sent / link + message, weights_sent / link + message
    # Gradients are zeroed and weights written whole; scaling, norm, clipping and Adam are those of the rank's own part.
    moved = (FLOAT32 + load.width) * parameters + (8 + 4 + 8 + 30) * parameters // data_size
    kernels = 8 * (2 + parameters // load.layout.reduce_bucket)
    return StepTime(
        tensor=2 * FLOAT32 * replicated * (tensor - 1) / tensor / machine.link(tensor, 1),
        gradients=max(last_sent / link, summed - last_backward) if machine.asynchronous else summed,
        weights=gathered,
        update=moved / machine.memory + _late(machine, kernels, moved),
    )


def data_parallel_traffic(parameters: int, data_size: int, width: int) -> tuple[int, int]:
    """Bytes that a rank sends in a step: a reduce-scatter of float32 gradients, an all-gather of weights of `width`."""
    return tuple(bytes_each * parameters * (data_size - 1) // data_size for bytes_each in (FLOAT32, width))


def pipeline_traffic(shape: ModelShape, load: Load) -> int:
    """Bytes of the hidden states, or of their gradient, that a micro-batch sends to a neighbouring stage."""
    return load.whole(shape.backbone.hidden)


def step_time(
    shape: ModelShape, load: Load, machine: Machine, split: Sequence[int], micro_batches: int, data_size: int
) -> StepTime:
    """The time of a step: that of its slowest pipeline stage, and of waiting for the others.

    Args:
        shape: the model.
        load: of a rank.
        machine: the rates.
        split: layers of each model part.
        micro_batches: that a rank accumulates.
        data_size: data-parallel size.
    """
    layout, stages = load.layout, load.layout.pipeline
    works, weights = (
        _by_stage(units, split, stages) for units in (unit_work(shape, load), flops.unit_weights(padded(shape), layout))
    )
    passes, updates = [], []
    for stage, (work, held) in enumerate(zip(works, weights, strict=True)):
        replicated = flops.head(shape).parameters if layout.head == "replicated" and stage == stages - 1 else 0
        whole = sum(held, Weights())
        parameters, last = whole.on_rank(layout.tensor), held[0].on_rank(layout.tensor)
        passed = stage_pass(machine, load, work)
        passes.append(passed + accumulation_pass(machine, load, parameters, whole.tensors))
        last_backward = passed.total * 2 / 3
        updates.append(update_time(machine, load, parameters, last, data_size, last_backward, replicated))
    slowest, update = (max(each, key=lambda time: time.total) for each in (passes, updates))
    idle = (stages - 1) / layout.virtual
    hop = pipeline_traffic(shape, load) / machine.link(stages, layout.tensor * data_size) + machine.message
    hops = 2 * (micro_batches * layout.virtual + idle) if stages > 1 else 0
    return slowest * micro_batches + update + StepTime(bubble=idle * slowest.total, borders=hops * hop)


def _by_stage(units: list[T], split: Sequence[int], stages: int) -> list[list[T]]:
    """The units of every stage, of all its model parts."""
    parts = by_part(units, split)
    return [[unit for part in parts[stage::stages] for unit in part] for stage in range(stages)]


def _late(machine: Machine, kernels: int, moved: int) -> float:
    """Seconds that the device waits for the launches of kernels that move these bytes, or for all launches on a CPU."""
    host = kernels * machine.launch
    return max(0.0, host - moved / machine.memory) if machine.asynchronous else host


def unit_kernels(shape: ModelShape, load: Load) -> list[Kernels]:
    """Kernels of each unit of `flops.unit_weights` for one micro-batch, a layer's second forward pass included."""
    layer = _layer(shape, load)
    if load.layout.recompute == "full":
        layer += Kernels(
            backward=layer.forward,
            moved_backward=layer.moved_forward,
            messages_backward=layer.messages_forward,
            products_backward=layer.products_forward,
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
    masked = costs.pointwise(embedded, embedded, kernels=(7, 2)) if tensor > 1 else Kernels()  # rows of other ranks
    look_up = costs.pointwise(2 * embedded, 2 * embedded + table) + costs.pointwise(2 * embedded, 0) + masked
    look_up += Kernels(messages_forward=int(tensor > 1), messages_backward=int(load.layout.sequence))
    rotary = Kernels(forward=8 if load.width < FLOAT32 else 7)  # its angles, cosines and sines, once for all layers
    if shape.head.reads_tokens:
        return look_up + rotary
    expanded, reduced = load.split(2 * d), load.whole(d)
    products = (
        costs.column_product(load, k * d, 2 * d)
        + costs.silu_kernel(load, expanded)
        + costs.row_product(load, 2 * d, d)
        + costs.bias_kernel(reduced)
    )
    return look_up + rotary + products + costs.layer_norm_kernel(reduced)


def _layer(shape: ModelShape, load: Load) -> Kernels:
    """One transformer layer, in the order of its forward pass."""
    backbone = shape.backbone
    d, ffn = backbone.hidden, load.split(backbone.ffn)
    key_value = d // backbone.heads * backbone.key_value_heads
    whole, query, key = load.whole(d), load.split(d), load.split(key_value)
    joint = query + 2 * key
    added = costs.pointwise(3 * whole, 3 * whole)  # the residual, and backward its two gradients
    # The products of the attention kernel stay on the chip: their causal half, as `flops.unit_costs` counts them.
    pairs = (Product(2 * d * load.rows * (load.positions + 1) // load.layout.tensor, 0),)
    attention = (
        costs.rms_norm_kernels(load, d)
        + costs.column_product(load, d, d + 2 * key_value)
        + costs.fused(load, 2 * joint, 2 * joint, _rotated_heads(query, key))
        + costs.pointwise(joint + query, 2 * (joint + query))
        + Kernels(products_forward=pairs, products_backward=2 * pairs)
        + costs.row_product(load, d, d)
    )
    feed_forward = (
        costs.fused(load, 4 * whole, 4 * whole, added + costs.rms_norm_kernels(load, d))
        + costs.column_product(load, d, 2 * backbone.ffn)
        + costs.swiglu_kernels(load, ffn, biased=False)
        + costs.row_product(load, backbone.ffn, d)
        + added
    )
    return attention + feed_forward


def _rotated_heads(query: int, key: int) -> Kernels:
    """The rotation of queries and keys of these bytes, and a copy of the values.

    Half of the features negated, then joined; two products and their sum. Backward likewise; the gradients of queries,
    keys and values are then joined in one tensor.
    """
    rotation = costs.pointwise(10 * (query + key), 10 * (query + key), kernels=(10, 10))
    return rotation + costs.pointwise(2 * key, 2 * (query + 2 * key))
