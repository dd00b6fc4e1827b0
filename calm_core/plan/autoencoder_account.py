"""The account of a training run of the autoencoder, which is data-parallel alone."""

from calm_core.config.experiment import Experiment
from calm_core.config.model_config import AutoencoderConfig, padded_vocabulary
from calm_core.config.parallel_config import ParallelConfig
from calm_core.model.costs import FLOAT32, TOKEN, Load
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
        UserError: if the world does not divide the global batch evenly, or a sample has too many tokens for the sampled
            output layer.
    """
    training, plan, config = experiment.autoencoder_training, experiment.plan, experiment.autoencoder
    shape = autoencoder_shape(config, vocabulary, experiment.data.k)
    micro_batches = accumulation(training, ParallelConfig(), world, "autoencoder_training")
    chunks = training.global_batch * training.positions
    outputs = config.outputs(vocabulary, training.positions * shape.k)
    tokens, work = chunks * shape.k, flops.autoencoder_training(shape, outputs) * chunks
    days = work * training.steps / (world * plan.peak_tflops * 1e12 * plan.mfu) / SECONDS_A_DAY
    width, device = (4, "cpu") if training.precision == "fp32" else (2, "cuda")
    parameters = flops.autoencoder_parameters(shape)
    held = states(parameters, world, width)
    load = Load(training.positions, training.micro_batch, ParallelConfig(), width, device)
    active = activations(shape, load, outputs)
    peak = held.held + max(active, held.step)
    return "\n".join(
        [
            f"model: {parameters / 1e6:.1f}M parameters, vocabulary {vocabulary}"
            + (f", logits of {outputs} tokens a sample" if outputs < vocabulary else ""),
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


def activations(shape: AutoencoderShape, load: Load, outputs: int) -> int:
    """Bytes of activations at the peak, when the loss has been computed on the logits of `outputs` tokens.

    Kept per chunk, `hidden` wide: the input of each norm (see `Load.rms_norm`) and its output, read by a matrix, in a
    block per token and a block per chunk of the encoder and of the decoder; the encoder's final norm likewise; the
    tokens of a chunk side by side, read by the encoder's join; the chunk, read by the decoder's expansion; the input of
    the decoder's final norm; and the gradient of its output, which the cross-entropy computes in its forward pass. Kept
    `ffn` wide in each block: gate, silu(gate), up and their product.

    Kept of the latent: 6 float32 tensors (mean and log_std of the posterior, its deviation, variance, noise, and the KL
    divergence), the input of the decoder and the dropout mask; of the tokens, the ids before and after dropout.

    For the table the cross-entropy keeps a float32 gradient, and backward adds to another; where the vocabulary is not
    a multiple of that of `padded_vocabulary`, it works on a padded copy. The logits of a slice are held in float32 and
    twice in the precision of the weights. A sampled output layer has its rows of the table, their ids and their
    gradients for each sample, and the table's gradient in the precision of the weights.
    """
    h, k, ffn, latent = shape.hidden, shape.k, shape.ffn, shape.latent
    blocks = 2 * (k + 1) * (load.rms_norm(h) + load.whole(h) + load.whole(4 * ffn))
    encoder = load.whole(k * h) + load.rms_norm(h) + load.whole(h)
    decoder = load.whole(h) + load.rms_norm(k * h) + load.whole(k * h)
    posterior = load.float32(6 * latent) + load.whole(latent) + load.rows * latent
    kept = blocks + encoder + decoder + posterior + 2 * load.rows * k * TOKEN
    sampled, rows = outputs < shape.vocabulary, padded_vocabulary(outputs)
    tables, inputs = (load.micro_batch, load.positions * k) if sampled else (1, load.rows * k)
    logits = min(LOGIT_ROWS, inputs) * rows * (2 * load.width + FLOAT32)
    copy = 0 if rows == outputs else load.width * rows * h
    gradients = 2 * FLOAT32 * tables * rows * h
    if sampled:
        gradients += tables * outputs * TOKEN + load.width * shape.vocabulary * h
    return kept + gradients + copy + logits
