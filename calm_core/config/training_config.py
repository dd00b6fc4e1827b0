"""How a training run proceeds: length, batches, schedule, checkpoints, faults."""

from dataclasses import dataclass, field

from calm_core.config.schema import option
from calm_core.errors import UserError

PRECISIONS = ("bf16", "fp32", "auto")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and gradient clipping (paper, section 4.1)."""

    learning_rate: float = option(3e-4, "peak learning rate")
    beta1: float = option(0.9, "decay of the first moment")
    beta2: float = option(0.95, "decay of the second moment")
    eps: float = option(1e-8, "added to the root of the second moment")
    weight_decay: float = option(0.1, "decoupled decay of matrices and embeddings; norms and biases have none")
    clip: float = option(1.0, "largest global gradient norm; 0 clips nothing")

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise UserError(f"optimizer.learning_rate={self.learning_rate} must be above 0.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)} is outside 0 <= {name} < 1.")
        for name in ("eps", "weight_decay", "clip"):
            if getattr(self, name) < 0:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must not be negative.")


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then constant (the paper's), cosine, or warm-up-stable-decay (wsd)."""

    kind: str = option("constant", "constant | cosine | wsd")
    warmup: int = option(2000, "steps of linear warm-up")
    decay: float = option(0.2, "share of the run over which wsd decays")
    floor: float = option(0.0, "learning rate at the end of cosine and wsd, as a share of the peak")

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "cosine", "wsd"):
            raise UserError(f"schedule.kind={self.kind!r} is unknown: choose constant, cosine or wsd.")
        if self.warmup < 0 or not 0 < self.decay <= 1 or not 0 <= self.floor <= 1:
            raise UserError("schedule wants warmup >= 0, 0 < decay <= 1 and 0 <= floor <= 1.")


@dataclass(frozen=True)
class SpikeConfig:
    """Loss spikes: what counts as one, and what becomes of its update."""

    action: str = option("off", "off | skip (leave the update out, moments included) | stop (end the run)")
    window: int = option(128, "applied updates whose median and deviation a new one is measured by")
    deviations: float = option(
        10.0, "a loss or gradient norm so many robust standard deviations above the median is a spike"
    )
    in_a_row: int = option(10, "consecutive spikes that end the run: then it is no spike but a new level")

    def __post_init__(self) -> None:
        if self.action not in ("off", "skip", "stop"):
            raise UserError(f"spikes.action={self.action!r} is unknown: choose off, skip or stop.")
        for name, least in (("window", 4), ("in_a_row", 1)):
            if getattr(self, name) < least:
                raise UserError(f"spikes.{name}={getattr(self, name)} must be at least {least}.")
        if self.deviations <= 0:
            raise UserError(f"spikes.deviations={self.deviations} must be above 0.")

    @property
    def remembered(self) -> int:
        """The updates that a run remembers."""
        return 0 if self.action == "off" else self.window


@dataclass(frozen=True)
class TrainingConfig:
    """One training run. A sample is `positions` consecutive chunks; a step consumes `global_batch` samples."""

    steps: int = option(250_000, "optimizer steps")
    global_batch: int = option(256, "samples per step, over all ranks")
    micro_batch: int = option(4, "samples per forward pass of one rank; the rest of its share is accumulated")
    positions: int = option(2048, "chunks per sample, S")
    precision: str = option("bf16", "bf16 (float32 masters and accumulation) | fp32 | auto (bf16 where it is faster)")
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    deterministic: bool = option(
        False, "bitwise the same run each time on a GPU too, more slowly; a CPU with as many threads does so anyway"
    )
    log_every: int = option(10, "steps between lines of metrics")
    eval_every: int = option(1000, "steps between evaluations on held-out documents; 0 evaluates at the end only")
    save_every: int = option(1000, "steps between checkpoints; 0 saves at the end only")
    milestones: list[int] = option([], "further steps after which to evaluate and to save a checkpoint")
    background_saves: bool = option(
        True,
        "write checkpoints while training goes on; takes host memory, 12 bytes a parameter over data-parallel ranks",
    )
    keep: int = option(2, "checkpoints kept, the newest ones")
    resume: str = option("auto", "auto (newest usable checkpoint of this run) | never (refuse a run folder in use)")
    init_from: str = option(
        "", "checkpoint folder to take weights from at the start, with a new optimizer and schedule"
    )
    bad_steps: int = option(5, "consecutive steps with a loss or gradient that is not finite before the run stops")
    hang_minutes: float = option(
        10.0,
        "longest wait for a step, an evaluation or a save before the watchdog ends the run (exit code 76); 0 is off",
    )
    hang_start_minutes: float = option(
        60.0, "the same until the first step is done: reading a checkpoint, first batches, compilation"
    )
    wandb: str = option("offline", "offline | online | disabled")
    wandb_group: str = option("", "group of the run in wandb, such as the name of a sweep")

    def __post_init__(self) -> None:
        counts = ("steps", "global_batch", "micro_batch", "positions", "log_every", "keep", "bad_steps")
        for least, names in ((1, counts), (0, ("eval_every", "save_every", "hang_minutes"))):
            for name in names:
                if getattr(self, name) < least:
                    raise UserError(f"training.{name}={getattr(self, name)} must be at least {least}.")
        for name, choices in (
            ("precision", PRECISIONS),
            ("resume", ("auto", "never")),
            ("wandb", ("offline", "online", "disabled")),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"training.{name}={getattr(self, name)!r} is unknown: choose {', '.join(choices)}.")
        if self.hang_start_minutes < self.hang_minutes:
            raise UserError(
                f"training.hang_start_minutes={self.hang_start_minutes} is below training.hang_minutes="
                f"{self.hang_minutes}: a start takes a step and more; raise it."
            )

    def micro_batches(self, data_size: int, multiple: int = 1) -> int:
        """Micro-batches that each data-parallel rank accumulates in a step, a multiple of `multiple`.

        Raises:
            UserError: if the global batch is not a multiple of micro-batch x data-parallel ranks x `multiple`.
        """
        together = self.micro_batch * data_size * multiple
        if self.global_batch % together:
            near = max(together, round(self.global_batch / together) * together)
            raise UserError(
                f"training.global_batch={self.global_batch} is not a multiple of training.micro_batch="
                f"{self.micro_batch} x {data_size} data-parallel ranks"
                f"{f' x {multiple} (interleaved stages)' if multiple > 1 else ''}: the nearest that is, is {near}."
            )
        return self.global_batch // (self.micro_batch * data_size)
