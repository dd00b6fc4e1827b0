"""The account of a training run of the autoencoder, which is data-parallel alone."""

from calm_core.config.experiment import Experiment
from calm_core.config.model_config import AutoencoderConfig
from calm_core.config.parallel_config import ParallelConfig
from calm_core.model.costs import FLOAT32, TOKEN
from calm_core.plan import flops
from calm_core.plan.account import SECONDS_A_DAY
from calm_core.plan.flops import AutoencoderShape
from calm_core.plan.layout import accumulation
from calm_core.plan.memory import states
from calm_core.plan.table import GIB, duration

LOGIT_ROWS = 1024  # tokens whose logits are held at once: see `calm_core.autoencoder.output_layer`


def describe(experiment: Experiment, vocabulary: int, world: int) -> str:
    """The account as text.

    Raises:
        UserError: if the world does not share the global batch evenly.
    """
    training, plan, config = experiment.autoencoder_training, experiment.plan, experiment.autoencoder
    shape = autoencoder_shape(config, vocabulary, experiment.data.k)
    micro_batches = accumulation(training, ParallelConfig(), world, "autoencoder_training")
    chunks = training.global_batch * training.positions
    tokens, work = chunks * shape.k, flops.autoencoder_training(shape) * chunks
    days = work * training.steps / (world * plan.peak_tflops * 1e12 * plan.mfu) / SECONDS_A_DAY
    width = 4 if training.precision == "fp32" else 2
    parameters = flops.autoencoder_parameters(shape)
    held = states(parameters, world, width)
    active = activations(shape, training.micro_batch * training.positions, width)
    peak = held.held + max(active, held.step)
    return "\n".join(
        [
            f"model: {parameters / 1e6:.1f}M parameters, vocabulary {vocabulary}",
            f"batch: {training.global_batch} samples a step = {world} ranks x {training.micro_batch} a micro-batch x "
            f"{micro_batches} accumulated",
            f"work: {tokens:,} tokens a step, {training.steps:,} steps, {tokens * training.steps / 1e9:.4g}B tokens",
            f"FLOPs: {work / tokens:.3g} a token, {work:.3g} a step, {work * training.steps:.3g} the run",
            f"time: {duration(days)} at {plan.mfu:.0%} of {plan.peak_tflops:g} TFLOP/s a device (plan.mfu, "
            "plan.peak_tflops)",
            f"memory of a rank in GiB: weights {held.weights / GIB:.2f}, gradients {held.gradients / GIB:.2f}, "
            f"optimizer {held.optimizer / GIB:.2f}, buckets {held.buckets / GIB:.2f}, "
            f"activations {active / GIB:.2f}, step {held.step / GIB:.2f}; peak {peak / GIB:.2f}, "
            f"{peak / GIB / plan.device_memory_gib:.0%} of {plan.device_memory_gib:g}",
        ]
    )


def autoencoder_shape(config: AutoencoderConfig, vocabulary: int, k: int) -> AutoencoderShape:
    """The shape of a configuration's autoencoder."""
    return AutoencoderShape(vocabulary, k, config.hidden, config.ffn_width, config.latent)


def activations(shape: AutoencoderShape, chunks: int, width: int) -> int:
    """Bytes that the forward pass of a micro-batch of `chunks` keeps, with what its loss computes besides.

    Each block keeps its input, the normalised input and four tensors of its inner width. The loss keeps both its
    gradients, that of the table in float32, and holds the logits of a slice in three forms.
    """
    h, k = shape.hidden, shape.k
    block = 2 * h + 4 * shape.ffn
    encoder = k * (block + h) + 2 * h + block + 2 * shape.latent
    decoder = block + h + k * (block + h) + 2 * k * h
    kept = chunks * (width * (encoder + decoder) + 2 * k * TOKEN + 6 * shape.latent * FLOAT32)
    logits = min(LOGIT_ROWS, chunks * k) * shape.vocabulary * (2 * width + FLOAT32)
    return kept + 2 * FLOAT32 * shape.vocabulary * h + logits
