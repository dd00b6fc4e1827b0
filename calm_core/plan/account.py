"""The account of a training run: what each pipeline stage of CALM holds, computes and sends, and what the run costs.

Its cost is hours, device-hours and money, and the disk that its data and checkpoints take.
"""

from dataclasses import dataclass

from calm_core.config.experiment import EvaluationConfig, PlanConfig
from calm_core.config.model_config import ModelShape
from calm_core.config.training_config import ParallelConfig, TrainingConfig
from calm_core.model.costs import FLOAT32, Load
from calm_core.plan import flops
from calm_core.plan.flops import AutoencoderShape
from calm_core.plan.layout import accumulation, by_part, pipeline_split, stage_fractions
from calm_core.plan.memory import States, peak, rank_parameters, states
from calm_core.plan.step_time import (
    Machine,
    StepTime,
    data_parallel_traffic,
    forward_pass,
    pipeline_traffic,
    step_time,
    unit_messages,
    unit_work,
)

TOKENS_PER_CORE = 3e6  # tokens/s that a process tokenizes: benchmarks/tokenization.py
FLOAT16 = 2


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

    sent = [unit.forward + unit.backward for unit in unit_messages(shape, load)]
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


@dataclass(frozen=True)
class RunCost:
    """Seconds of a run by what they are spent on, and what they cost.

    Attributes:
        training: all steps.
        evaluation: on held-out documents.
        checkpoints: waiting until one is written; those written in the background cost nothing here.
        start: until the first step.
        checkpoint_bytes: of one checkpoint.
        device_hours: of all ranks.
        money: their price, 0 if the plan names none.
    """

    training: float
    evaluation: float
    checkpoints: float
    start: float
    checkpoint_bytes: int
    device_hours: float
    money: float

    @property
    def total(self) -> float:
        """Seconds of all."""
        return self.training + self.evaluation + self.checkpoints + self.start


def run_cost(
    parameters: int,
    step: float,
    evaluating: float,
    training: TrainingConfig,
    plan: PlanConfig,
    world: int,
) -> RunCost:
    """The cost of a run of `training.steps` steps on `world` ranks.

    Args:
        parameters: of the whole model; a checkpoint holds each in float32, with what the optimizer keeps of it.
        step: seconds of a step.
        evaluating: seconds of an evaluation.
        training: the settings.
        plan: the machine.
        world: ranks.
    """
    size = FLOAT32 * (1 + training.optimizer.moments) * parameters
    evaluations, saves = (_times(training, every) for every in (training.eval_every, training.save_every))
    waits = len(evaluations & saves) if training.background_saves else len(saves)
    seconds = (
        step * training.steps,
        evaluating * len(evaluations),
        waits * size / (plan.storage_gbs * 1e9),
        plan.start_minutes * 60,
    )
    hours = sum(seconds) / 3600 * world
    return RunCost(*seconds, size, hours, hours * plan.price)


def _times(training: TrainingConfig, every: int) -> set[int]:
    """The steps after which something is done that is due every `every` steps, at milestones and at the end."""
    regular = range(every, training.steps + 1, every) if every else ()
    return {*regular, *(step for step in training.milestones if step <= training.steps), training.steps}


def evaluation_time(
    shape: ModelShape, load: Load, plan: PlanConfig, evaluation: EvaluationConfig, data_size: int
) -> float:
    """Seconds of an evaluation: forward passes of its windows, counted as those of training, one stage after another.

    Of the draws at the scored positions only those of the loss are counted. It is 0 where all windows are scored, whose
    number only the store knows.
    """
    machine, work = Machine.of(plan), unit_work(shape, load)
    passes = -(-evaluation.windows // (data_size * load.micro_batch))
    return passes * forward_pass(machine, load, work).total


@dataclass(frozen=True)
class DataCost:
    """What the data of a run takes.

    Attributes:
        tokens: of the corpus.
        token_bytes: of the token store.
        chunk_bytes: of the chunk store; 0 for a model that reads tokens.
        tokenizing: seconds of one processor core.
        encoding: seconds of one device to compute the latents of all chunks, or of the file system to take them if
            that is longer.
    """

    tokens: float
    token_bytes: float
    chunk_bytes: float
    tokenizing: float
    encoding: float


def data_cost(autoencoder: AutoencoderShape | None, vocabulary: int, tokens: float, plan: PlanConfig) -> DataCost:
    """The stores of a corpus of this many tokens, and how long it takes to make them."""
    width = 2 if vocabulary <= 1 << 16 else 4
    if autoencoder is None:
        return DataCost(tokens, width * tokens, 0, tokens / TOKENS_PER_CORE, 0)
    chunks = tokens / autoencoder.k
    size = chunks * (autoencoder.k * width + 2 * autoencoder.latent * FLOAT16)
    work = chunks * flops.autoencoder_encoding(autoencoder) / Machine.of(plan).matrices
    return DataCost(tokens, width * tokens, size, tokens / TOKENS_PER_CORE, max(work, size / (plan.storage_gbs * 1e9)))
