"""Layouts and micro-batches that fit the memory of a device, and which of them is fastest."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from calm_core.config.experiment import PlanConfig
from calm_core.config.model_config import ModelShape
from calm_core.config.training_config import ParallelConfig, TrainingConfig
from calm_core.errors import UserError
from calm_core.plan.account import Account, account
from calm_core.plan.layout import check_layout

USED = 0.9  # of a device's memory that a plan fills: its activations are predicted within a tenth
GIB = 2**30


@dataclass(frozen=True)
class Candidate:
    """A layout and a micro-batch that fit, and their account."""

    layout: ParallelConfig
    micro_batch: int
    account: Account


def micro_batches_of(training: TrainingConfig, layout: ParallelConfig, world: int) -> list[int]:
    """The micro-batches that divide a rank's samples of a step evenly, the largest first."""
    own, rest = divmod(training.global_batch, layout.data_parallel(world) * layout.micro_batch_multiple)
    return [] if rest else [size for size in range(own, 0, -1) if own % size == 0]


def chosen_micro_batch(
    training: TrainingConfig,
    layout: ParallelConfig,
    plan: PlanConfig,
    world: int,
    peak: Callable[[TrainingConfig], int],
    section: str = "training",
) -> TrainingConfig:
    """The settings with the micro-batch that they name or, where that is `auto`, with the largest that fits.

    Args:
        training: the settings.
        layout: of the ranks.
        plan: has the memory of a device.
        world: ranks.
        peak: bytes that a rank holds at most with given settings.
        section: the key of `training`.

    Raises:
        UserError: if none fits.
    """
    if training.micro_batch != "auto":
        return training
    sizes = micro_batches_of(training, layout, world)
    for size in sizes:
        chosen = replace(training, micro_batch=size)
        if peak(chosen) <= USED * plan.device_memory_gib * GIB:
            return chosen
    if not sizes:
        return replace(training, micro_batch=1)  # the ranks do not divide the batch: a later check refuses it
    raise UserError(
        f"{section}.micro_batch=auto: not even 1 fits in {USED:.0%} of {plan.device_memory_gib:.3g} GiB: set "
        "parallel.recompute=full, or spread the model over more ranks by parallel.tensor or parallel.pipeline."
    )


def largest_micro_batch(
    shape: ModelShape, training: TrainingConfig, layout: ParallelConfig, plan: PlanConfig, world: int
) -> TrainingConfig:
    """`chosen_micro_batch` of a model."""

    def peak(chosen: TrainingConfig) -> int:
        return account(shape, chosen, layout, plan, world).peak_memory

    return chosen_micro_batch(training, layout, plan, world, peak)


def fits(found: Account, plan: PlanConfig) -> bool:
    """Whether a run leaves a tenth of the device's memory free."""
    return found.peak_memory <= USED * plan.device_memory_gib * GIB


def candidates(shape: ModelShape, training: TrainingConfig, plan: PlanConfig, world: int) -> list[Candidate]:
    """For each size of tensor and pipeline parallelism what is fastest of all that fits, the fastest size first.

    The choice is of the micro-batch and of `parallel.head`. Layers are recomputed only where nothing fits otherwise.
    """
    found = []
    for layouts in _layouts(shape, training.positions, plan, world):
        for recompute in ("none", "full"):
            fitting = [
                candidate
                for layout in layouts
                for candidate in _fitting(shape, training, replace(layout, recompute=recompute), plan, world)
            ]
            if fitting:
                found.append(min(fitting, key=lambda each: (each.account.step.total, each.account.peak_memory)))
                break
    return sorted(found, key=lambda each: each.account.step.total)


def _layouts(shape: ModelShape, positions: int, plan: PlanConfig, world: int) -> Iterator[list[ParallelConfig]]:
    """Layouts whose tensor-parallel group is within a node, with sequence parallelism where it is possible.

    Those of a size differ in `parallel.head`.
    """
    for tensor in _powers(min(world, plan.node_devices)):
        for pipeline in _powers(min(world // tensor, shape.backbone.layers)):
            if world % (tensor * pipeline):
                continue
            for sequence in (True, False) if tensor > 1 else (False,):
                split = ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=sequence)
                layouts = [split, replace(split, head="replicated")] if sequence else [split]
                possible = [layout for layout in layouts if _possible(shape, positions, layout)]
                if possible:
                    yield possible
                    break


def _possible(shape: ModelShape, positions: int, layout: ParallelConfig) -> bool:
    try:
        check_layout(shape, positions, layout)
    except UserError:
        return False
    return True


def _fitting(
    shape: ModelShape, training: TrainingConfig, layout: ParallelConfig, plan: PlanConfig, world: int
) -> Iterator[Candidate]:
    for size in micro_batches_of(training, layout, world):
        try:
            found = account(shape, replace(training, micro_batch=size), layout, plan, world)
        except UserError:
            continue  # too few layers for the stages
        if fits(found, plan):
            yield Candidate(layout, size, found)


def _powers(most: int) -> list[int]:
    """The powers of two up to `most`."""
    return [2**power for power in range(most.bit_length()) if 2**power <= most]
