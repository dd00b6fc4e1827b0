"""Memory of one rank by closed form: weights, gradients, optimizer (ZeRO-1) and activations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from calm_core.config.model_config import ModelShape, padded_vocabulary
from calm_core.config.parallel_config import ParallelConfig
from calm_core.plan import flops
from calm_core.plan.flops import TIME_FEATURES, Weights
from calm_core.plan.pipeline_split import pieces

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


TOKEN = 8  # bytes

# Distances that the energy loss holds at once, and their copies (squares, slopes): see `energy_loss.py`.
ENERGY_SLICE = {"cpu": 2**19, "cuda": 2**25}

ENERGY_COPIES = 3


@dataclass(frozen=True)
class Load:
    """What a rank computes in one micro-batch.

    Attributes:
        positions: S, chunk positions of a sequence.
        micro_batch: B, sequences.
        layout: the layout over ranks.
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
        """Positions of all sequences."""
        return self.positions * self.micro_batch

    @property
    def own_rows(self) -> int:
        """Those that this rank holds between the parallel matrices."""
        return self.rows // self.layout.tensor if self.layout.sequence else self.rows

    @property
    def plain_norm(self) -> int:
        """Copies of its input that an RMSNorm keeps beyond the input itself."""
        return 1 if self.device == "cpu" else 0


@dataclass(frozen=True)
class Activations:
    """Bytes of one piece and one micro-batch.

    Attributes:
        kept: from its forward to its backward pass.
        forward: alive besides while it computes forward.
        backward: alive besides while it computes backward, a recomputed forward pass among them.
        gathered: buffer for the positions of all tensor-parallel ranks (sequence parallelism), kept and shared by all.
    """

    kept: int
    forward: int = 0
    backward: int = 0
    gathered: int = 0


def activations(shape: ModelShape, load: Load) -> list[Activations]:
    """Of each piece of the pipeline: embedding with compression, each layer, head with final norm and loss."""
    shape = padded(shape)
    head = {"energy": _energy, "softmax": _softmax}.get(shape.head.kind, _adaptive)
    return [_entrance(shape, load), *[_layer(shape, load)] * shape.backbone.layers, head(shape, load)]


def peak(shape: ModelShape, load: Load, split: Sequence[int], stage: int, micro_batches: int) -> int:
    """Bytes of activations that a stage holds at most, with `split` layers in each part of the pipeline.

    The stage walks its schedule, and every part its pieces, forward and back.
    """
    parts = pieces(activations(shape, load), split)
    own = parts[stage :: load.layout.pipeline]
    output = load.own_rows * shape.backbone.hidden * load.width  # kept by a part for the one that goes on from it
    most = held = 0
    for forward, virtual in schedule(stage, micro_batches, load.layout):
        part = own[virtual]
        if not forward:
            held -= sum(piece.kept for piece in part) + (0 if part is parts[-1] else output)
        inside = 0
        for piece in part:
            most = max(most, held + inside + piece.kept + (piece.forward if forward else piece.backward))
            inside += piece.kept
        if forward:
            held += inside + (0 if part is parts[-1] else output)
    return most + max(piece.gathered for part in own for piece in part)


def schedule(stage: int, micro_batches: int, layout: ParallelConfig) -> Iterator[tuple[bool, int]]:
    """(whether forward, virtual part) of each pass of a stage in a step: Megatron-core's 1F1B, interleaved or not."""
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
    """Tokens, their embeddings side by side, and the compression's two matrices; what leaves is the first layer's."""
    d, k, tensor = shape.backbone.hidden, shape.k, load.layout.tensor
    embedded = load.rows * k * d * load.width
    tokens = load.rows * k * TOKEN
    if shape.head.reads_tokens:
        return Activations(tokens, forward=embedded)
    own = load.own_rows * load.width
    kept = tokens + own * (k * d + d) + load.rows * load.width * 4 * d // tensor
    return Activations(kept, embedded, 2 * embedded, _gathered(k * d, load))


def _layer(shape: ModelShape, load: Load) -> Activations:
    """One transformer layer, with its input."""
    backbone, recompute, tensor = shape.backbone, load.layout.recompute, load.layout.tensor
    d, head_width = backbone.hidden, backbone.hidden // backbone.heads
    key_value = head_width * backbone.key_value_heads
    own, shared = load.own_rows * load.width, load.rows * load.width // tensor
    scores = load.rows * backbone.heads * FLOAT32 // tensor
    output = shared * d
    rotation = 4 * load.positions * head_width * load.width
    attention = rotation + shared * (2 * d + 3 * key_value) + output + scores  # projections, rotated ones, output
    feed_forward = shared * 5 * backbone.ffn  # gate and up, gate after SiLU, a copy of up (Megatron-core's), product
    kept = own * d * (4 + 2 * load.plain_norm) + attention + feed_forward
    backward = 2 * own * d + 2 * shared * backbone.ffn
    gathered = _gathered(d, load)
    if recompute == "full":
        return Activations(own * d, kept - own * d, kept - own * d + backward, gathered)
    if recompute == "selective":  # the output of the attention is needed by the next matrix in any case
        return Activations(kept - scores, scores, scores + output + backward, gathered)
    return Activations(kept, 0, backward, gathered)


def _energy(shape: ModelShape, load: Load) -> Activations:
    """Final norm, energy head on N samples of each position, energy loss."""
    d, head, latent, tensor = shape.backbone.hidden, shape.head, shape.latent, load.layout.tensor
    own, shared = load.own_rows * head.samples * load.width, load.rows * head.samples * load.width // tensor
    # float32 draws are kept as they are, all positions of them; bf16 ones are the own positions' copies.
    noise = (own if load.width < FLOAT32 else load.rows * head.samples * FLOAT32) * head.noise
    blocks = head.block_count(shape.backbone.layers) * d * (4 * own + 6 * shared)
    gradient = load.own_rows * head.samples * latent * FLOAT32
    kept = (
        load.own_rows * load.width * d * (4 + load.plain_norm)  # into and out of the norm, into and out of LN(W_h h)
        + noise
        + 2 * own * d  # around LN(W_e e)
        + blocks
        + d * (own + 2 * shared)  # the output network
        + gradient
        + _targets(shape, load)
    )
    draws = load.micro_batch * -(-load.positions // head.target_group) * head.target_samples * latent * FLOAT32
    distances = load.own_rows * head.samples * head.target_samples
    slices = ENERGY_COPIES * FLOAT32 * min(ENERGY_SLICE[load.device], distances)
    return Activations(kept, draws + slices + own * latent, gradient + 2 * own * d, _gathered(head.samples * d, load))


def _softmax(shape: ModelShape, load: Load) -> Activations:
    """Final norm and cross-entropy, whose probabilities are kept in float32."""
    d, logits = shape.backbone.hidden, load.rows * shape.vocabulary // load.layout.tensor
    kept = load.own_rows * load.width * d * (2 + load.plain_norm) + logits * FLOAT32 + _targets(shape, load)
    converted = load.width + FLOAT32 if load.width < FLOAT32 else FLOAT32
    return Activations(kept, logits * converted, logits * FLOAT32, _gathered(d, load))


def _adaptive(shape: ModelShape, load: Load) -> Activations:
    """Final norm and the network of the diffusion and flow heads, on one noise level of each position."""
    d, blocks = shape.backbone.hidden, shape.head.block_count(shape.backbone.layers)
    own, shared = load.own_rows * load.width, load.rows * load.width // load.layout.tensor
    features = load.own_rows * TIME_FEATURES * (load.width + FLOAT32)
    conditioning = own * d * (2 + load.plain_norm + 5)
    latents = load.own_rows * 10 * shape.latent * FLOAT32
    kept = features + conditioning + latents + blocks * d * (8 * own + 2 * shared) + 5 * own * d
    return Activations(kept + _targets(shape, load), 0, 3 * own * d, _gathered(d, load))


def _targets(shape: ModelShape, load: Load) -> int:
    """The chunk to predict at each position: tokens, and in float32 mean and log standard deviation."""
    return load.rows * (shape.k * TOKEN + 2 * shape.latent * FLOAT32)


def _gathered(width: int, load: Load) -> int:
    return load.rows * width * load.width if load.layout.sequence else 0
