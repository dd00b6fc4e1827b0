"""What a study will train and what it will cost, before anything runs."""

from calm_core import flops
from calm_core.evaluation.report import table
from calm_core.flops import AutoencoderShape
from calm_core.scaling.config import ScalingConfig
from calm_core.scaling.points import Point, family_experiment, hours, points

COLUMNS = ["model", "parameters", "N", "FLOPs/token", "decoding", "learning rate", "batch", "steps", "tokens", "FLOPs"]


def plan_table(config: ScalingConfig) -> str:
    """The models of the study, one a line, then the autoencoders and the sums.

    parameters: all of the model; N: without the tables of V rows; FLOPs/token: of training, with N head samples, in the
    paper's accounting; decoding: of inference, with the autoencoder's decoder; batch: tokens a step; hours: on the
    configured hardware, by the FLOPs that this code executes.
    """
    planned = points(config)
    lines = table([*COLUMNS, "hours"], [_row(config, point) for point in planned])
    calm = sorted({point.k for point in planned if not point.shape.head.reads_tokens})
    cost = {k: autoencoder_flops(config, k) for k in calm}
    total = sum(point.training_flops(point.tokens(point.steps)) for point in planned)
    lines += [f"autoencoder of K={k}, trained once: {spent:.3g} FLOPs" for k, spent in cost.items()]
    lines += [
        f"in all: {len(planned)} models, {total:.3g} FLOPs and {sum(cost.values()):.3g} for autoencoders, "
        f"{sum(hours(config, point) for point in planned):.3g} hours on {config.hardware.devices} devices of "
        f"{config.hardware.peak_tflops:g} TFLOP/s at {config.hardware.mfu:.0%} of their peak"
    ]
    return "\n".join(lines)


def autoencoder_shape(config: ScalingConfig, k: int) -> AutoencoderShape:
    """The shape of the autoencoder that the models of this K share."""
    autoencoder = family_experiment(config, k).autoencoder
    vocabulary = config.vocabulary
    return AutoencoderShape(vocabulary, k, autoencoder.hidden, autoencoder.ffn_width, autoencoder.latent)


def autoencoder_flops(config: ScalingConfig, k: int) -> float:
    """FLOPs that the training of one autoencoder executes."""
    training = family_experiment(config, k).autoencoder_training
    chunks = training.steps * training.global_batch * training.positions
    return chunks * flops.autoencoder_training(autoencoder_shape(config, k))


def _row(config: ScalingConfig, point: Point) -> list[str]:
    shape, tokens = point.shape, point.tokens(point.steps)
    decoder = None if shape.head.reads_tokens else autoencoder_shape(config, point.k)
    return [
        point.name,
        f"{sum(flops.parameters(shape).values()):,}",
        f"{point.size:,}",
        f"{point.training_flops(1):.3g}",
        f"{flops.paper_inference(shape, decoder, point.positions):.3g}",
        f"{point.rung.learning_rate:.2g}",
        f"{point.global_batch * point.context:,}",
        f"{point.steps:,}",
        f"{tokens:,}",
        f"{point.training_flops(tokens):.3g}",
        f"{hours(config, point):.3g}",
    ]
