"""Parameters and floating-point operations of a model by closed form, from its shape alone (no torch, no weights).

One multiply-add counts as two operations. Only matrix products count: tables, biases, norms, activations and the
optimizer are left out, as everywhere in the field. Two accountings are kept apart:

* `paper_*` reproduces the table of the CALM paper, to compare with it;
* `stage_costs` and `executed_training` count what this code must do, for utilisation and for balanced stages.
"""

from dataclasses import dataclass

from calm_core.config.model_config import ModelShape

# Network evaluations that one sample costs: DDPM's respaced steps, and ten midpoint steps of two evaluations each.
SAMPLING_EVALUATIONS = {"energy": 1, "diffusion": 100, "flow": 20, "softmax": 1}

TIME_FEATURES = 256  # sinusoidal features of the time step in the diffusion and flow heads

PAPER_TOKENS = 250_000 * 2_000_000  # steps times tokens a step

PAPER_POSITIONS = 2048


@dataclass(frozen=True)
class Weights:
    """The weights of a part, told apart by what they cost.

    Attributes:
        matrix: entries of matrices that multiply activations.
        leaf: those of `matrix` whose input needs no gradient, so that backward costs one product instead of two.
        other: tables, biases and norms.
    """

    matrix: int = 0
    leaf: int = 0
    other: int = 0

    def __add__(self, more: "Weights") -> "Weights":
        return Weights(self.matrix + more.matrix, self.leaf + more.leaf, self.other + more.other)

    def __mul__(self, times: int) -> "Weights":
        return Weights(self.matrix * times, self.leaf * times, self.other * times)

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.matrix + self.other

    @property
    def forward(self) -> int:
        """FLOPs of one application to one vector."""
        return 2 * self.matrix

    @property
    def training(self) -> int:
        """FLOPs of one application and its backward: gradients of the weights, and of the input where it needs one."""
        return 2 * (3 * self.matrix - self.leaf)


@dataclass(frozen=True)
class AutoencoderShape:
    """All that the size of the autoencoder depends on (its embedding table is also the output matrix)."""

    vocabulary: int
    k: int
    hidden: int
    ffn: int
    latent: int


@dataclass(frozen=True)
class StageCost:
    """One piece that a pipeline may cut between; FLOPs per sequence of S positions."""

    name: str
    parameters: int
    forward: int
    training: int


def linear(inputs: int, outputs: int, bias: bool = True) -> Weights:
    """A linear layer."""
    return Weights(matrix=inputs * outputs, other=outputs if bias else 0)


def leaf_linear(inputs: int, outputs: int) -> Weights:
    """A linear layer whose input is noise, time or data: nothing is propagated into it."""
    return linear(inputs, outputs) + Weights(leaf=inputs * outputs)


def layer_norm(width: int) -> Weights:
    """A LayerNorm: scale and shift."""
    return Weights(other=2 * width)


def embedding(shape: ModelShape) -> Weights:
    """The token table V x d: a look-up, not a product."""
    return Weights(other=shape.vocabulary * shape.backbone.hidden)


def compression(shape: ModelShape) -> Weights:
    """Linear(K d -> 2 d), Linear(2 d -> d), LayerNorm; nothing before a head that reads tokens."""
    if shape.head.reads_tokens:
        return Weights()
    d = shape.backbone.hidden
    return linear(shape.k * d, 2 * d) + linear(2 * d, d) + layer_norm(d)


def layer(shape: ModelShape) -> Weights:
    """One transformer layer: q, k, v, o, the three matrices of SwiGLU, two RMSNorms; no biases."""
    backbone = shape.backbone
    d = backbone.hidden
    key_value = 2 * d * (d // backbone.heads) * backbone.key_value_heads
    return Weights(matrix=2 * d * d + key_value + 3 * d * backbone.ffn, other=2 * d)


def final_norm(shape: ModelShape) -> Weights:
    """The RMSNorm after the last layer."""
    return Weights(other=shape.backbone.hidden)


def head_per_position(shape: ModelShape) -> Weights:
    """The part of the head that depends on the hidden state alone, so that it runs once per position."""
    d, kind = shape.backbone.hidden, shape.head.kind
    if kind == "softmax":
        return linear(d, shape.vocabulary, bias=False)
    if kind == "energy":
        condition_halves = linear(d, d, bias=False) * shape.head.block_count(shape.backbone.layers)
        return linear(d, d) + layer_norm(d) + condition_halves
    return linear(d, d)


def head_per_evaluation(shape: ModelShape) -> Weights:
    """The part of the head that runs once per sample (energy) or per evaluation of the network (diffusion, flow)."""
    d, head, latent = shape.backbone.hidden, shape.head, shape.latent
    blocks = head.block_count(shape.backbone.layers)
    if head.kind == "softmax":
        return Weights()
    if head.kind == "energy":
        block = layer_norm(d) + linear(d, d) + linear(d, d) + linear(d, 2 * d) + linear(d, d)
        entrance = leaf_linear(head.noise, d) + layer_norm(d)
        return entrance + block * blocks + layer_norm(d) + linear(d, d) + linear(d, latent)
    outputs = 2 * latent if head.kind == "diffusion" else latent  # diffusion also learns the variance
    entrance = leaf_linear(latent, d) + leaf_linear(TIME_FEATURES, d) + linear(d, d)
    block = linear(d, 3 * d) + layer_norm(d) + linear(d, d) + linear(d, d)
    return entrance + block * blocks + linear(d, 2 * d) + linear(d, outputs)


def whole_head(shape: ModelShape) -> Weights:
    """Both parts of the head."""
    return head_per_position(shape) + head_per_evaluation(shape)


def training_evaluations(shape: ModelShape) -> int:
    """Applications of the head's second part per position and training step: N samples, or one noise level."""
    return shape.head.samples if shape.head.kind == "energy" else 1


def parameters(shape: ModelShape) -> dict[str, int]:
    """Parameters by part, without the autoencoder; their sum is the model's size in the paper's table."""
    parts = {
        "embedding": embedding(shape),
        "compression": compression(shape),
        "layers": layer(shape) * shape.backbone.layers,
        "final_norm": final_norm(shape),
        "head": whole_head(shape),
    }
    return {name: part.parameters for name, part in parts.items()}


def autoencoder_decoder(shape: AutoencoderShape) -> Weights:
    """The decoder but for the output matrix: latent -> hidden, one block, expansion to K, one block a token, norm."""
    h = shape.hidden
    return linear(shape.latent, h) + _block(shape) * 2 + linear(h, shape.k * h) + Weights(other=h)


def autoencoder_parameters(shape: AutoencoderShape) -> int:
    """Encoder, decoder and the one table that embeds tokens and gives logits."""
    h = shape.hidden
    encoder = _block(shape) * 2 + linear(shape.k * h, h) + Weights(other=h) + linear(h, 2 * shape.latent)
    return (encoder + autoencoder_decoder(shape)).parameters + shape.vocabulary * h


def autoencoder_training(shape: AutoencoderShape) -> int:
    """FLOPs of training on one chunk, forward and backward; what runs once per token counts K times."""
    h, per_token = shape.hidden, _block(shape) * shape.k
    encoder = per_token + linear(shape.k * h, h) + _block(shape) + linear(h, 2 * shape.latent)
    decoder = linear(shape.latent, h) + _block(shape) + linear(h, shape.k * h) + per_token
    logits = linear(h, shape.vocabulary, bias=False) * shape.k
    return (encoder + decoder + logits).training


def autoencoder_decoding(shape: AutoencoderShape) -> int:
    """FLOPs of decoding one latent into the logits of its K tokens: the second block and the table run K times."""
    once_per_token = _block(shape).forward * (shape.k - 1) + 2 * shape.k * shape.vocabulary * shape.hidden
    return autoencoder_decoder(shape).forward + once_per_token


def paper_training(shape: ModelShape, tokens: int = PAPER_TOKENS, positions: int = PAPER_POSITIONS) -> float:
    """Training FLOPs in the accounting that reproduces the paper's table.

    Assumptions: backward costs twice the forward, without exceptions; the whole head, conditioning included, runs
    once per sample (N = 8); every position attends to all `positions` steps, masked or not; the embedding look-up, the
    energy loss and the autoencoder's encoder are free; 250,000 steps of 2,000,000 tokens.
    """
    forward = _paper_body(shape, positions) + whole_head(shape).forward * training_evaluations(shape)
    return 3 * forward * tokens / shape.k


def paper_inference(
    shape: ModelShape, autoencoder: AutoencoderShape | None = None, positions: int = PAPER_POSITIONS
) -> float:
    """Inference FLOPs per token in the accounting that reproduces the paper's table.

    Assumptions: one chunk costs one step of the backbone that attends to `positions` cached steps, one sample of the
    whole head, and the decoding of one latent by `autoencoder` (None for the softmax head); the sum is divided by K.
    """
    sample = whole_head(shape).forward * SAMPLING_EVALUATIONS[shape.head.kind]
    decoding = autoencoder_decoding(autoencoder) if autoencoder else 0
    return (_paper_body(shape, positions) + sample + decoding) / shape.k


def stage_costs(shape: ModelShape, positions: int) -> list[StageCost]:
    """What this code executes per sequence of S positions, piece by piece in the order of the pipeline.

    The pieces are the embedding with the compression, each layer, and the head with the final norm and its loss. The
    head's conditioning runs once per position; attention counts its causal half, S (S + 1) / 2 pairs, for the rest need
    not be computed; its backward counts two products per product, recomputation none. The energy loss counts
    its products with the M target draws, whose forward and backward run together.
    """
    per_layer = layer(shape)
    attention = 2 * shape.backbone.hidden * positions * (positions + 1)
    once, each, times = head_per_position(shape), head_per_evaluation(shape), training_evaluations(shape)
    loss_forward, loss_training = _energy_loss(shape)
    head_parameters = (final_norm(shape) + whole_head(shape)).parameters
    head_forward = once.forward + times * each.forward + loss_forward
    head_training = once.training + times * each.training + loss_training
    entrance = embedding(shape) + compression(shape)
    return [
        StageCost("embedding", entrance.parameters, positions * entrance.forward, positions * entrance.training),
        *(
            StageCost(
                f"layer {index}",
                per_layer.parameters,
                positions * per_layer.forward + attention,
                positions * per_layer.training + 3 * attention,
            )
            for index in range(shape.backbone.layers)
        ),
        StageCost("head", head_parameters, positions * head_forward, positions * head_training),
    ]


def executed_training(shape: ModelShape, positions: int) -> int:
    """FLOPs that one sequence of S positions costs in training, forward and backward (see `stage_costs`)."""
    return sum(stage.training for stage in stage_costs(shape, positions))


def utilisation(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation: executed FLOPs per second over the peak FLOPs per second of the devices used."""
    return flops / seconds / peak


def _block(shape: AutoencoderShape) -> Weights:
    """The autoencoder's residual block: RMSNorm and SwiGLU, no biases."""
    return Weights(matrix=3 * shape.hidden * shape.ffn, other=shape.hidden)


def _paper_body(shape: ModelShape, positions: int) -> int:
    """Forward FLOPs of compression and backbone at one position that attends to `positions` steps."""
    backbone = shape.backbone
    attention = 4 * positions * backbone.hidden * backbone.layers
    return compression(shape).forward + layer(shape).forward * backbone.layers + attention


def _energy_loss(shape: ModelShape) -> tuple[int, int]:
    """FLOPs of the energy loss per position, (forward, training): products of N samples and 1 spread with M draws."""
    if shape.head.kind != "energy":
        return 0, 0
    product = 2 * shape.head.target_samples * shape.latent
    return product * (shape.head.samples + 1), product * (2 * shape.head.samples + 1)
