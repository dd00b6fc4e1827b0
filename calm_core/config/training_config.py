"""How a training run proceeds: layout of ranks, length, batches, schedule, checkpoints, faults."""

import typing
from dataclasses import dataclass, field
from typing import Literal

from calm_core.config.model_config import TokenLossConfig
from calm_core.config.schema import PathText, check, option
from calm_core.errors import UserError

Precision = Literal["bf16", "fp32", "auto"]

PRECISIONS = typing.get_args(Precision)


@dataclass(frozen=True)
class ParallelConfig:
    """The layout. Data parallelism uses the ranks that tensor and pipeline parallelism leave.

    No field of it changes what is trained: any layout gives the same model.
    """

    tensor: int = option(1, "ranks that divide every layer's matrices (tensor parallelism)", at_least=1)
    pipeline: int = option(1, "stages that divide the layers (pipeline parallelism, 1F1B)", at_least=1)
    virtual: int = option(1, "model parts per stage; above 1 the pipeline schedule is interleaved", at_least=1)
    sequence: bool = option(False, "split activations along the sequence between the tensor-parallel ranks")
    head: Literal["split", "replicated"] = option(
        "split",
        "the energy head of sequence-parallel ranks; replicated: each holds it whole, for its own positions, and sends "
        "its gradients once a step instead of activations",
    )
    zero: int = option(1, "DeepSpeed ZeRO stage of the optimizer; only 1 is supported")
    recompute: Literal["none", "selective", "full"] = option(
        "none", "activations recomputed in the backward pass: selective recomputes attention, full whole layers"
    )
    compile: Literal["auto", "always", "never"] = option(
        "auto", "fuse the work between matrix products by torch.compile; auto: on a GPU"
    )
    split: list[int] = option([], "layers of each stage, pipeline x virtual numbers; [] balances the stages by FLOPs")
    timeout_minutes: float = option(20.0, "a collective that takes longer than this ends the run", above=0)
    reduce_bucket: int = option(
        40_000_000, "parameters whose gradients are reduced together, while the backward pass continues", at_least=1
    )

    def __post_init__(self) -> None:
        check(self, "parallel")
        if self.zero != 1:
            raise UserError(
                f"parallel.zero={self.zero} is not supported: the pipeline schedule accumulates whole gradients, "
                "which only ZeRO stage 1 allows; set parallel.zero=1."
            )
        if self.sequence and self.tensor == 1:
            raise UserError(
                "parallel.sequence=true needs parallel.tensor of at least 2: it splits between tensor-parallel ranks."
            )
        if self.head == "replicated" and not self.sequence:
            raise UserError(
                "parallel.head=replicated needs parallel.sequence=true: without it every rank has all positions."
            )
        if self.virtual > 1 and self.pipeline == 1:
            raise UserError(
                "parallel.virtual above 1 interleaves pipeline stages: set parallel.pipeline of at least 2."
            )
        parts = self.pipeline * self.virtual
        if self.split and (len(self.split) != parts or min(self.split) < 0 or 0 in self.split[1:-1]):
            raise UserError(
                f"parallel.split={self.split} must be parallel.pipeline x parallel.virtual = {parts} numbers of "
                "layers, in the order of the pipeline; only the first and the last may be 0."
            )

    def compiles(self, device: str) -> bool:
        """Whether training on this kind of device, "cuda" or "cpu", compiles.

        Not by default on a CPU: it needs a C++ compiler and a minute, and products take most of the time there.
        """
        return self.compile == "always" or (self.compile == "auto" and device == "cuda")

    @property
    def micro_batch_multiple(self) -> int:
        """The number of micro-batches is a multiple of this: an interleaved schedule needs one for each stage."""
        return self.pipeline if self.virtual > 1 else 1

    def data_parallel(self, world_size: int) -> int:
        """Data-parallel size for a world of `world_size` ranks.

        Raises:
            UserError: if tensor x pipeline does not divide the world.
        """
        model_parallel = self.tensor * self.pipeline
        if world_size % model_parallel:
            raise UserError(
                f"parallel.tensor={self.tensor} x parallel.pipeline={self.pipeline} does not divide the {world_size} "
                f"ranks of this run: start a multiple of {model_parallel} or change the layout."
            )
        return world_size // model_parallel


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and gradient clipping (paper, section 4.1)."""

    learning_rate: float = option(3e-4, "peak learning rate", belongs_to="training", above=0)
    beta1: float = option(0.9, "decay of the first moment", belongs_to="training", at_least=0, below=1)
    beta2: float = option(0.95, "decay of the second moment", belongs_to="training", at_least=0, below=1)
    eps: float = option(1e-8, "added to the root of the second moment", belongs_to="training", at_least=0)
    weight_decay: float = option(
        0.1,
        "decoupled decay of matrices and embeddings; norms and biases have none",
        belongs_to="training",
        at_least=0,
    )
    clip: float = option(1.0, "largest global gradient norm; 0 clips nothing", belongs_to="training", at_least=0)

    def __post_init__(self) -> None:
        check(self, "optimizer")

    @property
    def moments(self) -> int:
        """Float32 numbers that the optimizer keeps for each weight, beside the weight itself: AdamW's two moments."""
        return 2


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then constant (the paper's), cosine, or warm-up-stable-decay (wsd)."""

    kind: Literal["constant", "cosine", "wsd"] = option(
        "constant", "course of the learning rate after the warm-up", belongs_to="training"
    )
    warmup: int = option(2000, "steps of linear warm-up", belongs_to="training", at_least=0)
    decay: float = option(0.2, "fraction of the run over which wsd decays", belongs_to="training", above=0, at_most=1)
    floor: float = option(
        0.0,
        "learning rate at the end of cosine and wsd, as a fraction of the peak",
        belongs_to="training",
        at_least=0,
        at_most=1,
    )

    def __post_init__(self) -> None:
        check(self, "schedule")


@dataclass(frozen=True)
class SpikeConfig:
    """Loss spikes: what counts as one, and what is done about it."""

    action: Literal["off", "skip", "stop"] = option(
        "off", "skip: do not apply the update, nor count it in the moments; stop: end the run", belongs_to="training"
    )
    window: int = option(
        128,
        "applied updates whose median and deviation a new one is compared with",
        belongs_to="training",
        at_least=4,
    )
    deviations: float = option(
        10.0,
        "a loss or gradient norm this many robust standard deviations above the median is a spike",
        belongs_to="training",
        above=0,
    )
    in_a_row: int = option(
        10,
        "consecutive spikes that end the run: that many are a new level, not a spike",
        belongs_to="training",
        at_least=1,
    )

    def __post_init__(self) -> None:
        check(self, "spikes")

    @property
    def remembered(self) -> int:
        """The updates that a run remembers."""
        return 0 if self.action == "off" else self.window


@dataclass(frozen=True)
class TrainingConfig:
    """One training run. A sample is `positions` consecutive chunks; a step consumes `global_batch` samples."""

    steps: int = option(250_000, "optimizer steps", belongs_to="training", at_least=1)
    global_batch: int = option(256, "samples per step, over all ranks", belongs_to="training", at_least=1)
    micro_batch: int | Literal["auto"] = option(
        4,
        "samples per forward pass of one rank, which accumulates the gradients of its samples; auto: the most that fit "
        "its memory",
        belongs_to="nothing",
        at_least=1,
    )
    positions: int = option(2048, "chunks per sample, S", belongs_to="training", at_least=1)
    precision: Precision = option(
        "bf16", "bf16: with float32 masters and accumulation; auto: bf16 where it is faster", belongs_to="training"
    )
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    token_loss: TokenLossConfig = field(default_factory=TokenLossConfig)
    deterministic: bool = option(
        False,
        "bitwise the same run each time on a GPU too, more slowly; a CPU with as many threads always does so",
        belongs_to="nothing",
    )
    log_every: int = option(10, "steps between lines of metrics", belongs_to="nothing", at_least=1)
    eval_every: int = option(
        1000,
        "steps between evaluations on held-out documents; 0 evaluates at the end only",
        belongs_to="nothing",
        at_least=0,
    )
    save_every: int = option(
        1000, "steps between checkpoints; 0 saves at the end only", belongs_to="nothing", at_least=0
    )
    milestones: list[int] = option(
        [], "further steps after which to evaluate and to save a checkpoint", belongs_to="nothing"
    )
    background_saves: bool = option(
        True,
        "write checkpoints while training continues; takes host memory, 12 bytes a parameter over data-parallel ranks",
        belongs_to="nothing",
    )
    keep: int = option(2, "newest checkpoints kept, beside those of milestones", belongs_to="nothing", at_least=1)
    resume: Literal["auto", "never"] = option(
        "auto",
        "auto: from the newest usable checkpoint of this run; never: refuse a run folder in use",
        belongs_to="nothing",
    )
    init_from: PathText = option(
        "",
        "checkpoint folder to take weights from at the start, with a new optimizer and schedule",
        belongs_to="training",
    )
    resume_from: PathText = option(
        "",
        "checkpoint folder to resume from, with its optimizer and progress, in a run folder that has no checkpoint",
        belongs_to="training",
    )
    bad_steps: int = option(
        5,
        "consecutive steps with a loss or gradient that is not finite before the run stops",
        belongs_to="nothing",
        at_least=1,
    )
    hang_minutes: float = option(
        10.0,
        "longest wait for a step, an evaluation or a save before the watchdog ends the run (exit code 76); 0 is off",
        belongs_to="nothing",
        at_least=0,
    )
    hang_start_minutes: float = option(
        60.0,
        "the same until the first step is done: reading a checkpoint, first batches, compilation",
        belongs_to="nothing",
    )
    wandb: Literal["offline", "online", "disabled"] = option(
        "offline", "whether metrics go to wandb too, and when", belongs_to="nothing"
    )
    tensorboard: bool = option(
        False,
        "whether metrics go to TensorBoard too: event files in RUN/calm/tensorboard; needs the package tensorboard",
        belongs_to="nothing",
    )
    wandb_group: str = option("", "group of the run in wandb, such as the name of a sweep", belongs_to="nothing")

    def __post_init__(self) -> None:
        check(self, "training")
        if self.hang_start_minutes < self.hang_minutes:
            raise UserError(
                f"training.hang_start_minutes={self.hang_start_minutes} is below training.hang_minutes="
                f"{self.hang_minutes}, but a start includes a step: raise it."
            )

    @property
    def least_micro_batch(self) -> int:
        """The micro-batch; 1 while it is `auto`, which may come to that."""
        return 1 if self.micro_batch == "auto" else self.micro_batch

    def micro_batches(self, data_size: int, multiple: int = 1) -> int:
        """Micro-batches that each data-parallel rank accumulates in a step, a multiple of `multiple`.

        Raises:
            UserError: if the global batch is not a multiple of micro-batch x data-parallel ranks x `multiple`.
        """
        samples = self.least_micro_batch * data_size * multiple
        if self.global_batch % samples:
            near = max(samples, round(self.global_batch / samples) * samples)
            raise UserError(
                f"training.global_batch={self.global_batch} is not a multiple of training.micro_batch="
                f"{self.least_micro_batch} x {data_size} data-parallel ranks"
                f"{f' x {multiple} (interleaved stages)' if multiple > 1 else ''}: the nearest that is, is {near}."
            )
        return self.global_batch // (self.least_micro_batch * data_size)
