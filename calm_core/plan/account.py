"""The account of a training run of CALM: what each pipeline stage holds and does, and what the whole costs."""

from dataclasses import dataclass

from calm_core import flops
from calm_core.activations import Load, peak
from calm_core.memory import States, rank_parameters, states
from calm_core.model.config import ModelShape
from calm_core.parallel.config import ParallelConfig
from calm_core.pipeline_split import pieces, pipeline_split, shares
from calm_core.plan import traffic
from calm_core.plan.config import PlanConfig
from calm_core.plan.ranks import accumulation
from calm_core.training.config import TrainingConfig

SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class Stage:
    """One pipeline stage, as each of its ranks sees it; bytes unless said otherwise.

    Attributes:
        layers: transformer layers.
        parameters: weights on each rank.
        share: of the FLOPs of a step.
        states: weights, gradients, optimizer.
        activations: at their peak.
        backbone_sent: to the tensor-parallel group in a step, for compression and layers.
        head_sent: likewise for the head.
        gradients_sent: to the data-parallel group in a step, summing gradients.
        weights_sent: likewise, gathering the new weights.
        borders_sent: to the stages before and after in a step.
    """

    layers: int
    parameters: int
    share: float
    states: States
    activations: int
    backbone_sent: int
    head_sent: int
    gradients_sent: int
    weights_sent: int
    borders_sent: int

    @property
    def total(self) -> int:
        """Bytes at the peak: of a pass or of the optimizer's step, whichever holds more."""
        return self.states.held + max(self.activations, self.states.step)


@dataclass(frozen=True)
class Account:
    """A run of a model on a machine.

    Attributes:
        shape: the model.
        world: ranks.
        data_size: data-parallel size.
        micro_batches: that each rank accumulates in a step.
        stages: of the pipeline.
        tokens_per_step: tokens that a step trains on.
        paper_flops: a token's, in the paper's accounting.
        executed_flops: a token's, as this code computes it.
        bubble: idle share of the pipeline's time, were its stages equal.
        days: of the whole run, at the utilisation that the plan assumes.
    """

    shape: ModelShape
    world: int
    data_size: int
    micro_batches: int
    stages: list[Stage]
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


def _stage(shape: ModelShape, load: Load, split: list[int], stage: int, micro_batches: int, data_size: int) -> Stage:
    layout = load.layout

    def own(whole: list[int]) -> int:
        return sum(sum(part) for part in pieces(whole, split)[stage :: layout.pipeline])

    sent = traffic.tensor_parallel(shape, load)
    parameters = own(rank_parameters(shape, layout.tensor))
    gradients_sent, weights_sent = traffic.data_parallel(parameters, data_size, load.width)
    parts = layout.pipeline * layout.virtual
    borders = sum((part > 0) + (part < parts - 1) for part in range(stage, parts, layout.pipeline))
    return Stage(
        layers=sum(split[stage :: layout.pipeline]),
        parameters=parameters,
        share=shares(shape, load.positions, layout, split)[stage],
        states=states(parameters, data_size, load.width),
        activations=peak(shape, load, split, stage, micro_batches),
        backbone_sent=own([*sent[:-1], 0]) * micro_batches,
        head_sent=own([0] * (len(sent) - 1) + sent[-1:]) * micro_batches,
        gradients_sent=gradients_sent,
        weights_sent=weights_sent,
        borders_sent=borders * traffic.pipeline(shape, load) * micro_batches if layout.pipeline > 1 else 0,
    )
