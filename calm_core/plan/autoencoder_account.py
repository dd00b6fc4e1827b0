"""The account of a training run of the autoencoder, which is data-parallel alone."""

from dataclasses import replace

from calm_core.config.experiment import Experiment, PlanConfig
from calm_core.config.model_config import AutoencoderConfig, padded_vocabulary
from calm_core.config.training_config import ParallelConfig, TrainingConfig
from calm_core.model import costs as of
from calm_core.model import output_layer
from calm_core.model.costs import FLOAT32, TOKEN, Kernels, Load
from calm_core.plan import flops
from calm_core.plan.account import run_cost
from calm_core.plan.flops import AutoencoderShape
from calm_core.plan.layout import accumulation
from calm_core.plan.memory import states
from calm_core.plan.search import chosen_micro_batch
from calm_core.plan.step_time import Machine, Sent, StepTime, UnitWork, accumulation_pass, stage_pass, update_time
from calm_core.plan.table import GIB, cost_lines, time_lines

TENSORS = 25  # weights and biases: see `calm_core.autoencoder.model`


def describe(experiment: Experiment, vocabulary: int, world: int) -> str:
    """The account as text.

    Raises:
        UserError: if the world does not divide the global batch evenly, or a sample has too many tokens for the sampled
            output layer.
    """
    plan, shape = experiment.plan, autoencoder_shape(experiment.autoencoder, vocabulary, experiment.data.k)
    training = experiment.autoencoder_training
    outputs = experiment.autoencoder.outputs(vocabulary, training.positions * shape.k)
    training = largest_micro_batch(training, shape, outputs, plan, world)
    micro_batches = accumulation(training, ParallelConfig(), world, "autoencoder_training")
    chunks = training.global_batch * training.positions
    tokens, work = chunks * shape.k, flops.autoencoder_training(shape, outputs) * chunks
    load, parameters = _load(training), flops.autoencoder_parameters(shape)
    step = step_time(shape, load, outputs, Machine.of(plan), micro_batches, world)
    at_peak = work / (world * plan.peak_tflops * 1e12)
    seconds = at_peak / plan.mfu if plan.mfu else step.total
    held = states(parameters, world, load.width, training.optimizer.moments)
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
            "",
            *time_lines(step, seconds, at_peak / seconds, tokens, plan),
            *cost_lines(run_cost(parameters, seconds, 0.0, training, plan, world), world, plan),
            "",
            f"memory of a rank in GiB: weights {held.weights / GIB:.2f}, gradients {held.gradients / GIB:.2f}, "
            f"optimizer {held.optimizer / GIB:.2f}, activations {active / GIB:.2f}, "
            f"reduction {held.step / GIB:.2f}; peak {peak / GIB:.2f}, "
            f"{peak / GIB / plan.device_memory_gib:.0%} of {plan.device_memory_gib:g}",
        ]
    )


def largest_micro_batch(
    training: TrainingConfig, shape: AutoencoderShape, outputs: int, plan: PlanConfig, world: int
) -> TrainingConfig:
    """The settings with the micro-batch that they name or, where that is `auto`, with the largest that fits.

    Raises:
        UserError: if none fits.
    """

    def peak(chosen: TrainingConfig) -> int:
        load, parameters = _load(chosen), flops.autoencoder_parameters(shape)
        held = states(parameters, world, load.width, chosen.optimizer.moments)
        return held.held + max(activations(shape, load, outputs), held.step)

    return chosen_micro_batch(training, ParallelConfig(), plan, world, peak, "autoencoder_training")


def _load(training: TrainingConfig) -> Load:
    width, device = (4, "cpu") if training.precision == "fp32" else (2, "cuda")
    return Load(training.positions, training.micro_batch, ParallelConfig(), width, device)


def step_time(
    shape: AutoencoderShape, load: Load, outputs: int, machine: Machine, micro_batches: int, world: int
) -> StepTime:
    """The time of a step on `world` data-parallel ranks of `micro_batches` each, with logits of `outputs` tokens."""
    unit = UnitWork(kernels(shape, load, outputs), Sent())
    parameters = flops.autoencoder_parameters(shape)
    passed = stage_pass(machine, load, [unit])
    each = passed + accumulation_pass(machine, load, parameters, TENSORS)
    table = shape.vocabulary * shape.hidden
    return each * micro_batches + update_time(machine, load, parameters, table, world, passed.total * 2 / 3)


def kernels(shape: AutoencoderShape, load: Load, outputs: int) -> Kernels:
    """Kernels of a micro-batch, in the order of the forward pass.

    The cross-entropy passes several times over the float32 logits of each slice, and adds the slice's product to the
    gradient of the table in float32; it has both gradients when the forward pass ends. A sampled output layer sorts its
    keys and gathers its rows of the table for each sample.
    """
    h, k = shape.hidden, shape.k
    latents = load.float32(shape.latent)

    def block(times: int) -> Kernels:
        whole, wide = load.whole(times * h), load.whole(times * shape.ffn)
        products = of.linear_product(load, h, shape.ffn, times) * 2 + of.linear_product(load, shape.ffn, h, times)
        feed_forward = products + of.pointwise(5 * wide, 9 * wide, kernels=(2, 3))
        sums = of.pointwise(3 * whole, 6 * whole, kernels=(1, 2))  # the residual; gradients of the norm's output
        return of.rms_norm_kernels(load, times * h) + feed_forward + sums

    def linear(inputs: int, outputs: int) -> Kernels:
        return of.linear_product(load, inputs, outputs) + of.pointwise(0, load.whole(outputs))  # the bias's gradient

    look_up = of.pointwise(2 * load.whole(k * h), 2 * load.whole(k * h) + load.width * shape.vocabulary * h)
    encoder = look_up + block(k) + linear(k * h, h) + block(1)
    encoder += of.rms_norm_kernels(load, h) + linear(h, 2 * shape.latent)
    draws = of.noise_kernels(load, load.positions * (k + 2 * shape.latent)) * 3
    posterior = of.pointwise(30 * latents, 20 * latents, kernels=(20, 16))
    decoder = linear(shape.latent, h) + block(1) + linear(h, k * h) + block(k) + of.rms_norm_kernels(load, k * h)
    sampled = outputs < shape.vocabulary
    samples = load.micro_batch if sampled else 1  # each with a matrix of its own
    loss = output_layer.kernels(_eager(load), load.rows * k // samples, h, outputs) * samples
    if sampled:
        table = load.micro_batch * (4 * outputs * h * load.width + 6 * TOKEN * shape.vocabulary)
        loss += of.pointwise(table, table, kernels=(20 * load.micro_batch, 4))
    return encoder + draws + posterior + decoder + loss


def _eager(load: Load) -> Load:
    """The autoencoder is not compiled."""
    return replace(load, layout=ParallelConfig(compile="never"))


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
    a multiple of that of `padded_vocabulary`, it works on a padded copy. In addition, what the cross-entropy of a block
    holds. A sampled output layer has its rows of the table, their ids and their
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
    block = output_layer.activations(_eager(load), inputs, h, outputs).forward
    copy = 0 if rows == outputs else load.width * rows * h
    gradients = 2 * FLOAT32 * tables * rows * h
    if sampled:
        gradients += tables * outputs * TOKEN + load.width * shape.vocabulary * h
    return kept + gradients + copy + block
