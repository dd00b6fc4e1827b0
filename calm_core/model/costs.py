"""The vocabulary in which the parts of a network state what they cost, by closed form from their shape; no torch.

The functions are named like the layers of `model.layers` that they describe: `column`, `row` and `linear` build a
layer there and give its `Weights` here. Weights add up (`+`) and repeat (`*`), so a network's costs are written as the
network itself is. One multiply-add counts as two operations, and only matrix products count: table look-ups, biases,
norms, activation functions and the optimizer are omitted, as is usual in the field.
"""

from dataclasses import dataclass, fields

from calm_core.config.model_config import ModelShape
from calm_core.config.parallel_config import ParallelConfig

FLOAT32 = 4  # bytes
TOKEN = 8  # bytes of a token id, int64


@dataclass(frozen=True)
class Weights:
    """The weights of a network applied once to one vector, sorted by what they cost.

    Attributes:
        matrix: entries of matrices that multiply activations.
        leaf: those of `matrix` whose input needs no gradient, so that backward costs one product instead of two.
        other: tables, biases and norms.
        split: parameters, of all kinds, that are divided among tensor-parallel ranks; each rank holds the rest whole.
        summed_outputs: width of the outputs that tensor-parallel ranks sum in the forward pass (`row`, `table`).
        summed_inputs: width of the inputs whose gradient they sum in the backward pass (`column`).
    """

    matrix: int = 0
    leaf: int = 0
    other: int = 0
    split: int = 0
    summed_outputs: int = 0
    summed_inputs: int = 0

    def __add__(self, more: "Weights") -> "Weights":
        return Weights(*(getattr(self, field.name) + getattr(more, field.name) for field in fields(self)))

    def __mul__(self, times: int) -> "Weights":
        return Weights(*(getattr(self, field.name) * times for field in fields(self)))

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
    return Weights(matrix=inputs * outputs, other=outputs if bias else 0)


def leaf_linear(inputs: int, outputs: int) -> Weights:
    """A `linear` whose input is noise, time or data: no gradient is propagated into it."""
    return linear(inputs, outputs) + Weights(leaf=inputs * outputs)


def column(inputs: int, outputs: int, bias: bool = True) -> Weights:
    """A linear layer whose outputs, and so matrix and bias, are divided among tensor-parallel ranks."""
    whole = linear(inputs, outputs, bias)
    return whole + Weights(split=whole.parameters, summed_inputs=inputs)


def row(inputs: int, outputs: int, bias: bool = True) -> Weights:
    """A linear layer whose inputs, and so matrix but not bias, are divided among tensor-parallel ranks."""
    return linear(inputs, outputs, bias) + Weights(split=inputs * outputs, summed_outputs=outputs)


def table(rows: int, width: int, look_ups: int = 1) -> Weights:
    """An embedding table whose rows are divided among tensor-parallel ranks, with `look_ups` rows read for a vector."""
    return Weights(other=rows * width, split=rows * width, summed_outputs=look_ups * width)


def layer_norm(width: int) -> Weights:
    """A LayerNorm: scale and shift."""
    return Weights(other=2 * width)


def rms_norm(width: int) -> Weights:
    """An RMSNorm: scale."""
    return Weights(other=width)


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
        return self.whole(width) * (2 if self.device == "cpu" else 1)


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


def target_bytes(shape: ModelShape, load: Load) -> int:
    """Bytes of the chunk to predict at every position: its tokens, and in float32 posterior mean and log_std."""
    return load.rows * (shape.k * TOKEN + 2 * shape.latent * FLOAT32)
