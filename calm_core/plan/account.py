"""The account of a training run of CALM: what each pipeline stage holds, computes and sends, and the run's total."""

from dataclasses import dataclass

from calm_core.config.experiment import PlanConfig
from calm_core.config.model_config import ModelShape
from calm_core.config.parallel_config import ParallelConfig
from calm_core.config.training_config import TrainingConfig
from calm_core.model import token_loss
from calm_core.model.costs import FLOAT32, Load, Weights
from calm_core.model.heads.protocol import head_module
from calm_core.plan import flops
from calm_core.plan.layout import accumulation
from calm_core.plan.memory import States, peak, rank_parameters, states
from calm_core.plan.pipeline_split import by_part, pipeline_split, stage_fractions


def tensor_parallel_traffic(shape: ModelShape, load: Load) -> list[int]:
    """Bytes that a rank sends to its tensor-parallel group for each micro-batch, forward and backward, by unit.

    The ranks sum the output of a `row`, and the gradient of the input of a `column`. With sequence parallelism a sum is
    a reduce-scatter and an all-gather, as many bytes, and the input of a `column` is gathered once more in the backward
    pass. The losses' own exchange, a number per position, is omitted.
    """
    entrance, *layers, _ = flops.unit_weights(shape)
    if load.layout.recompute == "full":  # the second forward pass sums the outputs again
        layers = [each + Weights(summed_outputs=each.summed_outputs) for each in layers]
    head = head_module(shape.head.kind).costs(shape).training_weights
    side = _sent(load, token_loss.applied(shape)) // shape.token_loss.every if shape.token_loss else 0
    return [*(_sent(load, unit) for unit in (entrance, *layers)), _sent(load, head) + side]


def data_parallel_traffic(parameters: int, data_size: int, width: int) -> tuple[int, int]:
    """Bytes that a rank sends in a step to sum the float32 gradients, and to gather new weights of `width` bytes."""
    return tuple(bytes_each * parameters * (data_size - 1) // data_size for bytes_each in (2 * FLOAT32, width))


def pipeline_traffic(shape: ModelShape, load: Load) -> int:
    """Bytes of the hidden states, or of their gradient, that a micro-batch sends to a neighbouring stage."""
    return load.whole(shape.backbone.hidden)


def _sent(load: Load, weights: Weights) -> int:
    tensor = load.layout.tensor
    gathered_again = weights.summed_inputs if load.layout.sequence else 0
    width = 2 * (weights.summed_outputs + weights.summed_inputs) + gathered_again
    return load.rows * load.width * width * (tensor - 1) // tensor


SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class PipelineStage:
    """One pipeline stage, as each of its ranks sees it; in bytes unless said otherwise.

    Attributes:
        layers: transformer layers.
        parameters: weights on each rank.
        fraction: of the FLOPs of a step.
        states: weights, gradients, optimizer.
        activations: at their peak.
        backbone_sent: to the tensor-parallel group in a step, for compression and layers.
        head_sent: likewise for the head.
        gradients_sent: to the data-parallel group in a step, to sum gradients.
        weights_sent: likewise, to gather the new weights.
        borders_sent: to the previous and the next stage in a step.
    """

    layers: int
    parameters: int
    fraction: float
    states: States
    activations: int
    backbone_sent: int
    head_sent: int
    gradients_sent: int
    weights_sent: int
    borders_sent: int

    @property
    def total(self) -> int:
        """Bytes at the peak: in a pass or in the optimizer's step, whichever holds more."""
        return self.states.held + max(self.activations, self.states.step)


@dataclass(frozen=True)
class Account:
    """A run of a model on a machine.

    Attributes:
        shape: the model.
        world: ranks.
        data_size: data-parallel size.
        micro_batches: micro-batches that each rank accumulates in a step.
        stages: the pipeline stages.
        tokens_per_step: tokens that a step trains on.
        paper_flops: FLOPs per token in the paper's accounting.
        executed_flops: FLOPs per token that this code executes.
        bubble: idle fraction of the pipeline's time if its stages are equal.
        days: duration of the whole run at the utilisation that the plan assumes.
    """

    shape: ModelShape
    world: int
    data_size: int
    micro_batches: int
    stages: list[PipelineStage]
    tokens_per_step: int
    paper_flops: float
    executed_flops: float
    bubble: float
    days: float


def account(
    shape: ModelShape, training: TrainingConfig, layout: ParallelConfig, plan: PlanConfig, world: int
) -> Account:
    """The account of a run on `world` ranks; float32 weights count as on a CPU, bf16 weights as on a GPU.

    Raises:
        UserError: if the world, the layout and the batch do not fit together.
    """
    micro_batches = accumulation(training, layout, world)
    data_size = layout.data_parallel(world)
    split = pipeline_split(shape, training.positions, layout)
    width, device = (4, "cpu") if training.precision == "fp32" else (2, "cuda")
    load = Load(training.positions, training.micro_batch, layout, width, device)
    tokens = training.global_batch * training.positions * shape.k
    executed = flops.executed_training(shape, training.positions) / (training.positions * shape.k)
    seconds = executed * tokens / (world * plan.peak_tflops * 1e12 * plan.mfu)
    idle = layout.pipeline - 1
    return Account(
        shape=shape,
        world=world,
        data_size=data_size,
        micro_batches=micro_batches,
        stages=[_stage(shape, load, split, i, micro_batches, data_size) for i in range(layout.pipeline)],
        tokens_per_step=tokens,
        paper_flops=flops.paper_training(shape, tokens=1, positions=training.positions),
        executed_flops=executed,
        bubble=idle / (idle + micro_batches * layout.virtual),
        days=seconds * training.steps / SECONDS_A_DAY,
    )


def _stage(
    shape: ModelShape, load: Load, split: list[int], stage: int, micro_batches: int, data_size: int
) -> PipelineStage:
    layout = load.layout

    def own(units: list[int]) -> int:
        return sum(sum(part) for part in by_part(units, split)[stage :: layout.pipeline])

    sent = tensor_parallel_traffic(shape, load)
    parameters = own(rank_parameters(shape, layout.tensor))
    gradients_sent, weights_sent = data_parallel_traffic(parameters, data_size, load.width)
    parts = layout.pipeline * layout.virtual
    borders = sum((part > 0) + (part < parts - 1) for part in range(stage, parts, layout.pipeline))
    return PipelineStage(
        layers=sum(split[stage :: layout.pipeline]),
        parameters=parameters,
        fraction=stage_fractions(shape, load.positions, layout, split)[stage],
        states=states(parameters, data_size, load.width),
        activations=peak(shape, load, split, stage, micro_batches),
        backbone_sent=own([*sent[:-1], 0]) * micro_batches,
        head_sent=own([0] * (len(sent) - 1) + sent[-1:]) * micro_batches,
        gradients_sent=gradients_sent,
        weights_sent=weights_sent,
        borders_sent=borders * pipeline_traffic(shape, load) * micro_batches if layout.pipeline > 1 else 0,
    )
