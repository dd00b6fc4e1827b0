"""The vocabulary in which the parts of a network state what they cost, by closed form from their shape; no torch.

The functions are named like the layers of `model.layers` that they describe: `column`, `row` and `linear` build a
layer there and give its `Weights` here. Weights add up (`+`) and repeat (`*`), so a network's costs are written as the
network itself is. One multiply-add counts as two operations, and only matrix products count: table look-ups, biases,
norms, activation functions and the optimizer are omitted, as is usual in the field.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

from calm_core.config.model_config import ModelShape
from calm_core.config.training_config import ParallelConfig

FLOAT32 = 4  # bytes
TOKEN = 8  # bytes of a token id, int64

# Numbers per call of a CUDA generator. The numbers of a call that exceeds the threads resident on a GPU (270,336 on an
# H100) depend on how many they are; every data-centre GPU since 2017 but the T4 holds this many, or more.
CUDA_BLOCK = 2**16

# Logits that exist at a time (see `output_layer`). On a CPU they stay in its cache. On a GPU the products of a
# block must outweigh the float32 gradient of the matrix, which each block reads and writes.
LOGITS_AT_ONCE = {"cpu": 2**18, "cuda": 2**29}


def logit_rows(vocabulary: int, device: str) -> int:
    """Inputs whose logits of `vocabulary` tokens exist at a time on this kind of device."""
    return max(64, LOGITS_AT_ONCE[device] // vocabulary)


class Additive:
    """A dataclass of numbers that add up (`+`) and repeat (`*`) field by field; tuples are joined."""

    def __add__(self, more: Self) -> Self:
        return type(self)(*(getattr(self, field.name) + getattr(more, field.name) for field in fields(self)))

    def __mul__(self, times: int) -> Self:
        return type(self)(*(getattr(self, field.name) * times for field in fields(self)))


@dataclass(frozen=True)
class Weights(Additive):
    """The weights of a network applied once to one vector, sorted by what they cost.

    Attributes:
        matrix: entries of matrices that multiply activations.
        leaf: those of `matrix` whose input needs no gradient, so that backward costs one product instead of two.
        other: tables, biases and norms.
        split: parameters, of all kinds, that are divided among tensor-parallel ranks; each rank holds the rest whole.
        summed_outputs: width of the outputs that tensor-parallel ranks sum in the forward pass (`row`, `table`).
        summed_inputs: width of the inputs whose gradient they sum in the backward pass (`column`).
        gathered_once: those of them that the backward pass does not gather again, and whose gradient it sums when no
            product is left to compute (`vocabulary_matrix`).
        tensors: parameters in the sense of torch: matrices, biases, scales, shifts and tables.
    """

    matrix: int = 0
    leaf: int = 0
    other: int = 0
    split: int = 0
    summed_outputs: int = 0
    summed_inputs: int = 0
    gathered_once: int = 0
    tensors: int = 0

    @property
    def replicated(self) -> "Weights":
        """The same, whole on every rank, which sends nothing for them."""
        return replace(self, split=0, summed_outputs=0, summed_inputs=0, gathered_once=0)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.matrix + self.other

    @property
    def forward(self) -> int:
        """FLOPs of one application to one vector."""
        return 2 * self.matrix

    @property
    def training(self) -> int:
        """FLOPs of one application and its backward: gradients of the weights, and of the input where it needs one."""
        return 2 * (3 * self.matrix - self.leaf)

    def on_rank(self, tensor: int) -> int:
        """Parameters that each of `tensor` tensor-parallel ranks holds."""
        return self.parameters - self.split + self.split // tensor


def linear(inputs: int, outputs: int, bias: bool = True) -> Weights:
    """A linear layer that every tensor-parallel rank holds whole."""
    return Weights(matrix=inputs * outputs, other=outputs if bias else 0, tensors=1 + bias)


def leaf_linear(inputs: int, outputs: int) -> Weights:
    """A `linear` whose input is noise, time or data: no gradient is propagated into it."""
    return linear(inputs, outputs) + Weights(leaf=inputs * outputs)


def column(inputs: int, outputs: int, bias: bool = True) -> Weights:
    """A linear layer whose outputs, and so matrix and bias, are divided among tensor-parallel ranks."""
    whole = linear(inputs, outputs, bias)
    return whole + Weights(split=whole.parameters, summed_inputs=inputs)


def vocabulary_matrix(width: int, rows: int) -> Weights:
    """A `column` without bias whose outputs are logits: its gradient is computed in the forward pass."""
    return column(width, rows, bias=False) + Weights(gathered_once=width)


def row(inputs: int, outputs: int, bias: bool = True) -> Weights:
    """A linear layer whose inputs, and so matrix but not bias, are divided among tensor-parallel ranks."""
    return linear(inputs, outputs, bias) + Weights(split=inputs * outputs, summed_outputs=outputs)


def table(rows: int, width: int, look_ups: int = 1) -> Weights:
    """An embedding table whose rows are divided among tensor-parallel ranks, with `look_ups` rows read for a vector."""
    return Weights(other=rows * width, split=rows * width, summed_outputs=look_ups * width, tensors=1)


def layer_norm(width: int) -> Weights:
    """A LayerNorm: scale and shift."""
    return Weights(other=2 * width, tensors=2)


def rms_norm(width: int) -> Weights:
    """An RMSNorm: scale."""
    return Weights(other=width, tensors=1)


@dataclass(frozen=True)
class HeadCosts:
    """What a generative head computes for one position.

    Attributes:
        per_position: weights applied once per position: what depends on the hidden state alone.
        per_evaluation: weights applied once per evaluation of the head's network.
        training_evaluations: evaluations per position in a training step.
        sampling_evaluations: evaluations per draw.
        loss_forward: FLOPs of the loss's own matrix products per position, forward.
        loss_training: the same forward and backward.
        shared_positions: neighbouring positions that share draws in the loss, so that one rank must work on all of
            them.
    """

    per_position: Weights
    per_evaluation: Weights = Weights()
    training_evaluations: int = 1
    sampling_evaluations: int = 1
    loss_forward: int = 0
    loss_training: int = 0
    shared_positions: int = 1

    @property
    def weights(self) -> Weights:
        """The whole network applied once."""
        return self.per_position + self.per_evaluation

    @property
    def training_weights(self) -> Weights:
        """The network as a training step applies it to a position (for FLOPs and traffic, not for parameters)."""
        return self.per_position + self.per_evaluation * self.training_evaluations


@dataclass(frozen=True)
class Load:
    """What a rank computes in one micro-batch.

    Attributes:
        positions: S, chunk positions of a sequence.
        micro_batch: B, sequences.
        layout: the layout of ranks.
        width: bytes of an activation, 2 for bf16 and 4 for float32.
        device: "cuda" or "cpu", whose kernels are assumed.
    """

    positions: int
    micro_batch: int
    layout: ParallelConfig
    width: int = 2
    device: str = "cuda"

    @property
    def compiled(self) -> bool:
        """Whether pointwise work is fused (see `model.pointwise`): what a kernel can compute again is not kept."""
        return self.layout.compiles(self.device)

    @property
    def of_head(self) -> "Load":
        """The load of the head: replicated, it is that of a single rank with this rank's positions."""
        if self.layout.head == "split":
            return self
        layout = replace(self.layout, tensor=1, sequence=False, head="split")
        return replace(self, positions=self.positions // self.layout.tensor, layout=layout)

    @property
    def rows(self) -> int:
        """Positions of all sequences, S x B."""
        return self.positions * self.micro_batch

    @property
    def own_rows(self) -> int:
        """Positions that this rank holds between the parallel matrices: with sequence parallelism its S/TP x B."""
        return self.rows // self.layout.tensor if self.layout.sequence else self.rows

    def whole(self, width: int) -> int:
        """Bytes of an activation of `width` per position that is not divided by width: `own_rows` of it."""
        return self.own_rows * width * self.width

    def split(self, width: int) -> int:
        """Bytes of an activation whose `width` is divided among tensor-parallel ranks: all rows of it."""
        return self.rows * width * self.width // self.layout.tensor

    def float32(self, width: int) -> int:
        """Bytes of a float32 tensor of `width` at each own position."""
        return self.own_rows * width * FLOAT32

    def gathered(self, width: int) -> int:
        """Bytes of the buffer in which sequence parallelism collects a matrix's input of `width` from all ranks."""
        return self.rows * width * self.width if self.layout.sequence else 0

    def rms_norm(self, width: int) -> int:
        """Bytes that an RMSNorm keeps: its input and, where torch composes it of elementwise kernels (CPU), a copy."""
        return self.whole(width) * (2 if self.device == "cpu" and not self.compiled else 1)


@dataclass(frozen=True)
class Activations:
    """Bytes of the activations of one unit of the pipeline (see `plan.flops.unit_costs`) for one micro-batch.

    Attributes:
        kept: from its forward to its backward pass.
        forward: alive in addition while it computes forward.
        backward: alive in addition while it computes backward, including a recomputed forward pass.
        gathered: buffer for the inputs of all tensor-parallel ranks, which all units share (sequence parallelism).
    """

    kept: int
    forward: int = 0
    backward: int = 0
    gathered: int = 0


@dataclass(frozen=True)
class Product:
    """A matrix product: its FLOPs, and the bytes of the matrices that it reads and writes."""

    flops: int
    moved: int

    @classmethod
    def of(cls, width: int, rows: int, inputs: int, outputs: int, matrices: int = 1) -> "Product":
        """`[rows, inputs] @ [inputs, outputs]` of numbers of `width` bytes; each of so many blocks has a matrix."""
        return cls(2 * rows * inputs * outputs, width * (rows * (inputs + outputs) + matrices * inputs * outputs))


@dataclass(frozen=True)
class Kernels(Additive):
    """What a unit of the pipeline executes for one micro-batch.

    Kernels add up (`+`) and repeat (`*`), so a unit's are written as its forward pass is. A view starts no kernel.

    Attributes:
        forward: kernels started in the forward pass, matrix products included.
        backward: likewise in the backward pass.
        moved_forward: bytes that kernels other than matrix products read and write in the forward pass.
        moved_backward: likewise in the backward pass.
        messages_forward: collectives of the tensor-parallel group in the forward pass.
        messages_backward: likewise in the backward pass.
        products_forward: matrix products of the forward pass.
        products_backward: those that only a backward pass needs, also where they are computed before it.
        beside: for each of `messages_backward` that a GPU sends while it computes, the product that it computes.
    """

    forward: int = 0
    backward: int = 0
    moved_forward: int = 0
    moved_backward: int = 0
    messages_forward: int = 0
    messages_backward: int = 0
    products_forward: tuple[Product, ...] = ()
    products_backward: tuple[Product, ...] = ()
    beside: tuple[Product, ...] = ()


def pointwise(forward: int, backward: int, kernels: tuple[int, int] = (1, 1)) -> Kernels:
    """Kernels that read and write these numbers of bytes forward and backward; none where there are no bytes."""
    return Kernels(kernels[0] if forward else 0, kernels[1] if backward else 0, forward, backward)


def product(load: Load, rows: int, inputs: int, outputs: int, leaf: bool = False) -> Kernels:
    """A product with a weight matrix: one product forward; backward one each for its input, unless a leaf, and weight.

    Each of the three reads two of the same three matrices and writes the third. A bias that it does not add is counted
    by what follows (`bias_kernel`).
    """
    one = (Product.of(load.width, rows, inputs, outputs),)
    backward = one if leaf else 2 * one
    return Kernels(1, len(backward), products_forward=one, products_backward=backward)


def linear_product(load: Load, inputs: int, outputs: int, uses: int = 1, leaf: bool = False) -> Kernels:
    """The product of a `linear` layer, applied `uses` times at each own position."""
    return product(load, load.own_rows * uses, inputs, outputs, leaf)


def column_product(load: Load, inputs: int, outputs: int, uses: int = 1) -> Kernels:
    """The product of a `column` layer, with the messages that gather its input and sum its input's gradient.

    The backward pass gathers the input again beside the product for the gradient of the input, and sums this gradient
    beside that of the weights.
    """
    parallel, gathers = int(load.layout.tensor > 1), int(load.layout.sequence)
    products = product(load, load.rows * uses, inputs, outputs // load.layout.tensor)
    beside = products.products_forward * (parallel + gathers)
    return products + Kernels(messages_forward=gathers, messages_backward=len(beside), beside=beside)


def row_product(load: Load, inputs: int, outputs: int, uses: int = 1) -> Kernels:
    """The product of a `row` layer, with the messages that sum its output and gather its output's gradient."""
    parallel, gathers = int(load.layout.tensor > 1), int(load.layout.sequence)
    products = product(load, load.rows * uses, inputs // load.layout.tensor, outputs)
    return products + Kernels(messages_forward=parallel, messages_backward=gathers)


def conversion(load: Load, width: int, backward: int = 1) -> Kernels:
    """A tensor of `width` at each own position converted to or from float32, which bf16 activations need."""
    if load.width == FLOAT32:
        return Kernels()
    moved = load.whole(width) + load.float32(width)
    return pointwise(moved, moved * backward)


def fused(load: Load, forward: int, backward: int, eager: Kernels) -> Kernels:
    """A function of `model.pointwise`: compiled, one kernel each way that moves these bytes; else those of `eager`."""
    return pointwise(forward, backward) if load.compiled else eager


def bias_kernel(size: int) -> Kernels:
    """A bias added to an output of `size` bytes; its gradient reads that of the output."""
    return pointwise(2 * size, size)


def silu_kernel(load: Load, size: int, biased: bool = True) -> Kernels:
    """SiLU of a tensor of `size` bytes, to which a bias may be added before."""
    eager = pointwise(2 * size, 3 * size)
    return fused(load, 2 * size, 3 * size, bias_kernel(size) + eager if biased else eager)


def swiglu_kernels(load: Load, size: int, biased: bool = True) -> Kernels:
    """silu(g) * u of `size` bytes; backward its two gradients are joined in one tensor."""
    eager = pointwise(5 * size, 9 * size, kernels=(2, 3)) + pointwise(0, 4 * size)
    return fused(load, 3 * size, 5 * size, bias_kernel(2 * size) + eager if biased else eager)


def layer_norm_kernel(size: int) -> Kernels:
    """A LayerNorm of a tensor of `size` bytes."""
    return pointwise(2 * size, 3 * size)


def rms_norm_kernels(load: Load, width: int) -> Kernels:
    """An RMSNorm of `width` at each own position: a kernel on a GPU or compiled, else several in float32 on a CPU."""
    if load.device == "cuda" or load.compiled:
        return pointwise(load.whole(2 * width), load.whole(3 * width))
    copies = (2, 3) if load.width < FLOAT32 else (0, 0)  # to float32 and back
    moved = [
        load.float32(passes * width) + 3 * n * load.whole(width) for passes, n in zip((8, 24), copies, strict=True)
    ]
    return pointwise(*moved, kernels=(6 + copies[0], 14 + copies[1]))


def noise_kernels(load: Load, numbers: int) -> Kernels:
    """The draws of a stream, `numbers` of float32 for each sample, filled one by one and stacked: see `model.noise`."""
    fills = -(-numbers // CUDA_BLOCK) if load.device == "cuda" else 1
    return pointwise(3 * FLOAT32 * numbers * load.micro_batch, 0, (load.micro_batch * fills + 1, 0))


def target_bytes(shape: ModelShape, load: Load) -> int:
    """Bytes of the chunk to predict at every position: its tokens, and in float32 posterior mean and log_std."""
    return load.rows * (shape.k * TOKEN + 2 * shape.latent * FLOAT32)
