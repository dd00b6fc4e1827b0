"""How a run is laid out over ranks: tensor, pipeline, sequence and data parallelism."""

from dataclasses import dataclass
from typing import Literal

from calm_core.config.schema import check, option
from calm_core.errors import UserError


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
        40_000_000, "parameters whose gradients are reduced together, while the backward pass goes on", at_least=1
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
