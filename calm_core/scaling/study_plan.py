"""What a study will train and what it will cost."""

from collections.abc import Sequence

from calm_core.config.scaling_config import ScalingConfig
from calm_core.evaluation.tables import table
from calm_core.manifest import MANIFEST, read_manifest
from calm_core.plan import flops
from calm_core.plan.flops import AutoencoderShape
from calm_core.scaling.points import Point, family_experiment, hours, points, shared_experiment

COLUMNS = ["model", "parameters", "N", "FLOPs/token", "decoding", "learning rate", "batch", "steps", "tokens", "FLOPs"]


def plan_table(config: ScalingConfig) -> str:
    """The models of the study, one per line, then the autoencoders, the totals, and warnings.

    parameters: all of the model; N: without the tables of V rows; FLOPs/token: of training, with N head samples, in the
    paper's accounting; decoding: of inference, with the autoencoder's decoder; batch: tokens a step; hours: on the
    configured hardware, by the FLOPs that this code executes.
    """
    planned = points(config)
    lines = table([*COLUMNS, "hours"], [_row(config, point) for point in planned])
    calm = sorted({point.k for point in planned if not point.shape.head.reads_tokens})
    cost = {k: autoencoder_flops(config, k) for k in calm}
    total = sum(point.training_flops(point.tokens(point.steps)) for point in planned)
    hardware, shared = config.hardware, sum(cost.values())
    spent = sum(hours(config, point) for point in planned) + shared / hardware.flops_per_hour
    lines += [
        f"autoencoder of K={k}, trained once: {of_k:.3g} FLOPs, {of_k / hardware.flops_per_hour:.3g} hours"
        for k, of_k in cost.items()
    ]
    lines += [
        f"in all: {len(planned)} models, {total:.3g} FLOPs and {shared:.3g} for autoencoders, {spent:.3g} hours on "
        f"{hardware.devices} devices of {hardware.peak_tflops:g} TFLOP/s at {hardware.mfu:.0%} of their peak"
    ]
    return "\n".join([*lines, *_warnings(config, planned)])


def autoencoder_shape(config: ScalingConfig, k: int) -> AutoencoderShape:
    """The shape of the autoencoder that the models of this K share."""
    autoencoder = family_experiment(config, k).autoencoder
    vocabulary = config.vocabulary
    return AutoencoderShape(vocabulary, k, autoencoder.hidden, autoencoder.ffn_width, autoencoder.latent)


def autoencoder_flops(config: ScalingConfig, k: int) -> float:
    """FLOPs that the training of one autoencoder executes."""
    training = family_experiment(config, k).autoencoder_training
    chunks = training.steps * training.global_batch * training.positions
    return float(
        chunks * flops.autoencoder_training(autoencoder_shape(config, k))
    )  # too large for an integer of a table


def _warnings(config: ScalingConfig, planned: Sequence[Point]) -> list[str]:
    """A line for each condition that distorts the results, with the models concerned."""
    warmup, epoch = config.base.training.schedule.warmup, _epoch(config)
    early = [point.name for point in planned if point.budget_steps[0] <= 2 * warmup]
    read = {point.name: point.tokens(point.steps) / epoch for point in planned if epoch}
    again = [f"{name} ({epochs:.3g})" for name, epochs in read.items() if epochs > 1]
    lines = []
    if early:
        lines.append(
            f"warning: the first budget comes within twice the warm-up (base.training.schedule.warmup={warmup}) for "
            f"{', '.join(early)}: shorten it, or raise the least of grid.budgets"
        )
    if again:
        lines.append(
            f"warning: more than one epoch of the {epoch:,} tokens is read by {', '.join(again)}: "
            "give base.data.corpus more text, or lower the largest of grid.budgets"
        )
    return lines


def _epoch(config: ScalingConfig) -> int:
    """Tokens to train on; 0 if the token store does not exist yet, or a blend replaces it."""
    store = shared_experiment(config).paths.tokens
    if config.base.data.blend or not (store / MANIFEST).exists():
        return 0
    return read_manifest(store, "tokens")["splits"]["train"]["tokens"]


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
