"""How a training run proceeds: length, batches, schedule, checkpoints, faults."""

from dataclasses import dataclass, field

from calm_core.config import option
from calm_core.errors import UserError
from calm_core.parallel.optimizer import OptimizerConfig
from calm_core.parallel.precision import PRECISIONS
from calm_core.training.schedule import ScheduleConfig
from calm_core.training.spikes import SpikeConfig


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
