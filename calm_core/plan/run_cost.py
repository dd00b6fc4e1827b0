"""What a whole run costs: hours, device-hours and money; the disk that its data and checkpoints take."""

from dataclasses import dataclass

from calm_core.config.experiment import EvaluationConfig, PlanConfig
from calm_core.config.model_config import ModelShape
from calm_core.config.training_config import TrainingConfig
from calm_core.model.costs import FLOAT32, Load
from calm_core.plan import flops
from calm_core.plan.flops import AutoencoderShape
from calm_core.plan.step_time import Machine, forward_pass, unit_work

TOKENS_PER_CORE = 3e6  # tokens/s that a process tokenizes: benchmarks/tokenization.py
FLOAT16 = 2


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
