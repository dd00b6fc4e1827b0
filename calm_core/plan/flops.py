"""Parameters and floating-point operations of a model by closed form, from its shape alone (see `model.costs`).

There are two accountings, which must not be mixed:

* `paper_*` counts as the CALM paper does, to compare with its table (`plan.paper` has the differences that remain);
* `unit_costs` and `executed_training` count what this code must compute, for utilisation and for balanced stages.
"""

from dataclasses import dataclass

from calm_core.config.model_config import ModelShape
from calm_core.config.training_config import ParallelConfig
from calm_core.model import token_loss
from calm_core.model.costs import Weights, column, layer_norm, linear, rms_norm, row, table
from calm_core.model.heads import head_module

PAPER_TOKENS = 250_000 * 2_000_000  # steps times tokens a step

PAPER_POSITIONS = 2048


@dataclass(frozen=True)
class AutoencoderShape:
    """All that the size of the autoencoder depends on (its embedding table is also the output matrix)."""

    vocabulary: int
    k: int
    hidden: int
    ffn: int
    latent: int


@dataclass(frozen=True)
class UnitCost:
    """A unit of the model, which a pipeline does not divide; FLOPs per sequence of S positions."""

    name: str
    parameters: int
    forward: int
    training: int


def embedding(shape: ModelShape) -> Weights:
    """The token table V x d, read K times for a position: a look-up, not a product."""
    return table(shape.vocabulary, shape.backbone.hidden, look_ups=shape.k)


def compression(shape: ModelShape) -> Weights:
    """Linear(K d -> 2 d), Linear(2 d -> d), LayerNorm; nothing before a head that reads tokens."""
    if shape.head.reads_tokens:
        return Weights()
    d = shape.backbone.hidden
    return column(shape.k * d, 2 * d) + row(2 * d, d) + layer_norm(d)


def layer(shape: ModelShape) -> Weights:
    """One transformer layer: queries, keys and values, output, the matrices of SwiGLU, two RMSNorms; no biases."""
    backbone = shape.backbone
    d = backbone.hidden
    key_value = d // backbone.heads * backbone.key_value_heads
    attention = column(d, d + 2 * key_value, bias=False) + row(d, d, bias=False)
    feed_forward = column(d, 2 * backbone.ffn, bias=False) + row(backbone.ffn, d, bias=False)
    return rms_norm(d) + attention + rms_norm(d) + feed_forward


def final_norm(shape: ModelShape) -> Weights:
    """The RMSNorm after the last layer."""
    return rms_norm(shape.backbone.hidden)


def head(shape: ModelShape) -> Weights:
    """The generative head."""
    return head_module(shape.head.kind).costs(shape).weights


def unit_weights(shape: ModelShape, layout: ParallelConfig | None = None) -> list[Weights]:
    """The weights of every unit of the model, in the order of the pipeline; a `layout` may replicate the head.

    The units are the embedding with the compression, each layer, and the final norm with the head and its side loss.
    """
    layers = [layer(shape)] * shape.backbone.layers
    own = head(shape).replicated if layout and layout.head == "replicated" else head(shape)
    last = final_norm(shape) + own + token_loss.weights(shape)
    return [embedding(shape) + compression(shape), *layers, last]


def parameters(shape: ModelShape) -> dict[str, int]:
    """Parameters by component, without the autoencoder; their sum is the model's size in the paper's table."""
    weights = {
        "embedding": embedding(shape),
        "compression": compression(shape),
        "layers": layer(shape) * shape.backbone.layers,
        "final_norm": final_norm(shape),
        "head": head(shape),
    }
    return {name: each.parameters for name, each in weights.items()}


def unit_costs(shape: ModelShape, positions: int) -> list[UnitCost]:
    """What this code executes per sequence of S positions, by unit (see `unit_weights`).

    Attention counts its causal half, S (S + 1) / 2 pairs: the rest need not be computed. Its backward counts two
    products for each, the recomputation inside the kernel none. A head counts what depends on the hidden state alone
    once per position, the rest once per draw, and the matrix products of its loss; a token side loss adds to training.
    """
    entrance, *layers, last = unit_weights(shape)
    attention = 2 * shape.backbone.hidden * positions * (positions + 1)
    costs = head_module(shape.head.kind).costs(shape)
    used = costs.training_weights
    return [
        UnitCost("embedding", entrance.parameters, positions * entrance.forward, positions * entrance.training),
        *(
            UnitCost(
                f"layer {index}",
                each.parameters,
                positions * each.forward + attention,
                positions * each.training + 3 * attention,
            )
            for index, each in enumerate(layers)
        ),
        UnitCost(
            "head",
            last.parameters,
            positions * (used.forward + costs.loss_forward),
            positions * (used.training + costs.loss_training) + token_loss.training_flops(shape, positions),
        ),
    ]


def executed_training(shape: ModelShape, positions: int) -> int:
    """FLOPs that one sequence of S positions costs in training, forward and backward (see `unit_costs`)."""
    return sum(unit.training for unit in unit_costs(shape, positions))


def utilisation(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation: executed FLOPs per second over the peak FLOPs per second of the devices used."""
    return flops / seconds / peak


def paper_training(shape: ModelShape, tokens: int = PAPER_TOKENS, positions: int = PAPER_POSITIONS) -> float:
    """Training FLOPs in the accounting that comes closest to the paper's table.

    Assumptions: backward costs twice the forward, without exceptions; the whole head, conditioning included, runs
    once per draw (N = 8); every position attends to all `positions` steps, masked or not; the embedding look-up, the
    head's loss and the autoencoder's encoder are free; 250,000 steps of 2,000,000 tokens.
    """
    costs = head_module(shape.head.kind).costs(shape)
    forward = _paper_body(shape, positions) + costs.weights.forward * costs.training_evaluations
    return 3 * forward * tokens / shape.k


def paper_inference(
    shape: ModelShape, autoencoder: AutoencoderShape | None = None, positions: int = PAPER_POSITIONS
) -> float:
    """Inference FLOPs per token in the accounting that comes closest to the paper's table.

    Assumptions: one chunk costs one step of the backbone that attends to `positions` cached steps, one draw of the
    whole head, and the decoding of one latent by `autoencoder` (None for the softmax head); the sum is divided by K.
    """
    costs = head_module(shape.head.kind).costs(shape)
    draw = costs.weights.forward * costs.sampling_evaluations
    decoding = autoencoder_decoding(autoencoder) if autoencoder else 0
    return (_paper_body(shape, positions) + draw + decoding) / shape.k


def _paper_body(shape: ModelShape, positions: int) -> int:
    """Forward FLOPs of compression and backbone at one position that attends to `positions` steps."""
    backbone = shape.backbone
    attention = 4 * positions * backbone.hidden * backbone.layers
    return compression(shape).forward + layer(shape).forward * backbone.layers + attention


def autoencoder_decoder(shape: AutoencoderShape) -> Weights:
    """The decoder without the output matrix: latent -> hidden, one block, expansion to K, one block a token, norm."""
    h = shape.hidden
    return linear(shape.latent, h) + _block(shape) * 2 + linear(h, shape.k * h) + rms_norm(h)


def autoencoder_parameters(shape: AutoencoderShape) -> int:
    """Encoder, decoder and the one table that embeds tokens and gives logits."""
    h = shape.hidden
    encoder = _block(shape) * 2 + linear(shape.k * h, h) + rms_norm(h) + linear(h, 2 * shape.latent)
    return (encoder + autoencoder_decoder(shape)).parameters + shape.vocabulary * h


def autoencoder_training(shape: AutoencoderShape, outputs: int = 0) -> int:
    """FLOPs of training on one chunk, forward and backward; what runs once per token counts K times.

    `outputs` is the number of tokens whose logits are computed for each token; 0 means the whole vocabulary.
    """
    h, per_token = shape.hidden, _block(shape) * shape.k
    encoder = per_token + linear(shape.k * h, h) + _block(shape) + linear(h, 2 * shape.latent)
    decoder = linear(shape.latent, h) + _block(shape) + linear(h, shape.k * h) + per_token
    logits = linear(h, outputs or shape.vocabulary, bias=False) * shape.k
    return (encoder + decoder + logits).training


def autoencoder_decoding(shape: AutoencoderShape) -> int:
    """FLOPs of decoding one latent into the logits of its K tokens: the second block and the table run K times."""
    once_per_token = _block(shape).forward * (shape.k - 1) + 2 * shape.k * shape.vocabulary * shape.hidden
    return autoencoder_decoder(shape).forward + once_per_token


def autoencoder_encoding(shape: AutoencoderShape) -> int:
    """FLOPs of encoding one chunk by the folded encoder, whose first stage is a look-up of each token."""
    return (_block(shape) + linear(shape.hidden, 2 * shape.latent)).forward


def _block(shape: AutoencoderShape) -> Weights:
    """The autoencoder's residual block: RMSNorm and SwiGLU, no biases."""
    h = shape.hidden
    return rms_norm(h) + linear(h, 2 * shape.ffn, bias=False) + linear(shape.ffn, h, bias=False)
