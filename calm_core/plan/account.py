"""The account of a training run of CALM: what each pipeline stage holds, computes and sends, and the run's total."""

from dataclasses import dataclass

from calm_core.config.experiment import PlanConfig
from calm_core.config.model_config import ModelShape
from calm_core.config.training_config import ParallelConfig, TrainingConfig
from calm_core.model.costs import Load
from calm_core.plan import flops
from calm_core.plan.layout import accumulation, by_part, pipeline_split, stage_fractions
from calm_core.plan.memory import States, peak, rank_parameters, states
from calm_core.plan.step_time import (
    Machine,
    StepTime,
    data_parallel_traffic,
    pipeline_traffic,
    step_time,
    unit_messages,
)


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
        step: predicted time of a step.
        seconds: of a step: the predicted ones, or those at the utilisation that the plan assumes.
        mfu: model FLOPs utilisation at these seconds.
    """

    shape: ModelShape
    world: int
    data_size: int
    micro_batches: int
    stages: list[PipelineStage]
    tokens_per_step: int
    paper_flops: float
    executed_flops: float
    step: StepTime
    seconds: float
    mfu: float

    @property
    def peak_memory(self) -> int:
        """Bytes that a rank holds at most, of the stage that holds most."""
        return max(stage.total for stage in self.stages)


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
    step = step_time(shape, load, Machine.of(plan), split, micro_batches, data_size)
    at_peak = executed * tokens / (world * plan.peak_tflops * 1e12)
    seconds = at_peak / plan.mfu if plan.mfu else step.total
    return Account(
        shape=shape,
        world=world,
        data_size=data_size,
        micro_batches=micro_batches,
        stages=[
            _stage(shape, load, split, i, micro_batches, data_size, training.optimizer.moments)
            for i in range(layout.pipeline)
        ],
        tokens_per_step=tokens,
        paper_flops=flops.paper_training(shape, tokens=1, positions=training.positions),
        executed_flops=executed,
        step=step,
        seconds=seconds,
        mfu=at_peak / seconds,
    )


def _stage(
    shape: ModelShape, load: Load, split: list[int], stage: int, micro_batches: int, data_size: int, moments: int
) -> PipelineStage:
    layout = load.layout

    def own(units: list[int]) -> int:
        return sum(sum(part) for part in by_part(units, split)[stage :: layout.pipeline])

    sent = [sum(passes) for passes in unit_messages(shape, load)]
    parameters = own(rank_parameters(shape, layout))
    gradients_sent, weights_sent = data_parallel_traffic(parameters, data_size, load.width)
    parts = layout.pipeline * layout.virtual
    borders = sum((part > 0) + (part < parts - 1) for part in range(stage, parts, layout.pipeline))
    return PipelineStage(
        layers=sum(split[stage :: layout.pipeline]),
        parameters=parameters,
        fraction=stage_fractions(shape, load.positions, layout, split)[stage],
        states=states(parameters, data_size, load.width, moments),
        activations=peak(shape, load, split, stage, micro_batches),
        backbone_sent=own([*sent[:-1], 0]) * micro_batches,
        head_sent=own([0] * (len(sent) - 1) + sent[-1:]) * micro_batches,
        gradients_sent=gradients_sent,
        weights_sent=weights_sent,
        borders_sent=borders * pipeline_traffic(shape, load) * micro_batches if layout.pipeline > 1 else 0,
    )
