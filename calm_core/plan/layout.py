"""Whether a layout of ranks fits a model and a batch: what would fail later, or run with wrong results, is refused."""

from collections.abc import Iterable

from calm_core.config.model_config import VOCABULARY_MULTIPLE, ModelShape
from calm_core.config.training_config import ParallelConfig, TrainingConfig
from calm_core.errors import UserError
from calm_core.model.heads import head_module


def accumulation(training: TrainingConfig, layout: ParallelConfig, world: int, section: str = "training") -> int:
    """Micro-batches that each data-parallel rank accumulates in a step; `section` is the key of `training`.

    Raises:
        UserError: if the world does not fit; it names the nearest worlds and the nearest global batch that do.
    """
    model = layout.tensor * layout.pipeline
    fitting = sorted(model * size for size in data_sizes(training, layout))
    if not world % model and world in fitting:
        return training.micro_batches(world // model, layout.micro_batch_multiple)
    near = [max((w for w in fitting if w < world), default=0), min((w for w in fitting if w > world), default=0)]
    worlds = " or ".join(str(w) for w in near if w)
    size = max(1, round(world / model))
    together = training.least_micro_batch * size * layout.micro_batch_multiple
    batch = max(1, round(training.global_batch / together)) * together
    raise UserError(
        f"plan.world={world} ranks do not fit parallel.tensor={layout.tensor} x parallel.pipeline={layout.pipeline} "
        f"and {section}.global_batch={training.global_batch} of micro-batches of {training.least_micro_batch}: "
        + (f"the nearest worlds that do are {worlds}; " if worlds else "no world does; ")
        + f"the nearest batch for {size * model} ranks is {section}.global_batch={batch}."
    )


def data_sizes(training: TrainingConfig, layout: ParallelConfig) -> list[int]:
    """Data-parallel sizes that divide the global batch evenly."""
    rest, remainder = divmod(training.global_batch, training.least_micro_batch * layout.micro_batch_multiple)
    return [] if remainder else [size for size in range(1, rest + 1) if rest % size == 0]


def rank_groups(layout: ParallelConfig, world: int) -> dict[str, list[list[int]]]:
    """The data-, tensor- and pipeline-parallel groups, as Megatron-core forms them, without importing it.

    Rank r is at tensor index r mod T, data index r / T mod D and pipeline index r / (T D): neighbours share a layer's
    matrices, the farthest ranks share the layers.

    Raises:
        RuntimeError: if a rank is not in exactly one group of each kind, or a group has another size than its kind's.
    """
    tensor, data = layout.tensor, layout.data_parallel(world)
    ranks = range(world)
    stages = [ranks[start : start + tensor * data] for start in range(0, world, tensor * data)]
    groups = {
        "dp": [list(stage[index::tensor]) for stage in stages for index in range(tensor)],
        "tp": [list(ranks[start : start + tensor]) for start in range(0, world, tensor)],
        "pp": [list(ranks[start :: tensor * data]) for start in range(tensor * data)],
    }
    for kind, size in {"dp": data, "tp": tensor, "pp": layout.pipeline}.items():
        check_groups(kind, groups[kind], size, world)
    return groups


def check_groups(kind: str, groups: Iterable[list[int]], size: int, world: int) -> None:
    """Refuse groups that do not hold each of `world` ranks exactly once, `size` in each.

    Raises:
        RuntimeError: naming the kind.
    """
    groups = list(groups)
    if sorted(rank for group in groups for rank in group) != list(range(world)) or {len(g) for g in groups} != {size}:
        raise RuntimeError(f"the {kind} groups of {world} ranks do not hold each rank once, {size} in each")


def check_layout(shape: ModelShape, positions: int, layout: ParallelConfig) -> None:
    """Refuse a layout whose tensor-parallel ranks cannot divide this model, or its samples of S positions, evenly.

    `pipeline_split` checks the stages.

    Raises:
        UserError: naming the key and how to change it.
    """
    backbone, tensor = shape.backbone, layout.tensor
    if backbone.key_value_heads % tensor:
        raise UserError(
            f"parallel.tensor={tensor} does not divide the {backbone.key_value_heads} key/value heads of the model "
            "(model.kv_groups, or model.heads where that is 0): choose a divisor of them."
        )
    if layout.head == "replicated" and shape.head.kind != "energy":
        raise UserError(f"parallel.head=replicated is for head.kind=energy, not {shape.head.kind}: set it to split.")
    for name in ("hidden", "ffn"):
        if getattr(backbone, name) % tensor:
            raise UserError(
                f"parallel.tensor={tensor} does not divide model.{name}={getattr(backbone, name)}: change one of them."
            )
    if VOCABULARY_MULTIPLE % tensor:
        raise UserError(
            f"parallel.tensor={tensor} does not divide {VOCABULARY_MULTIPLE}, and every vocabulary is padded to a "
            f"multiple of {VOCABULARY_MULTIPLE}: choose a power of two."
        )
    side = shape.token_loss
    own = positions // tensor if layout.sequence else positions
    if side and own % side.every:
        raise UserError(
            f"training.token_loss.every={side.every} does not divide the {own} positions of a sample on each rank "
            "(training.positions, over parallel.tensor where parallel.sequence=true): choose a divisor."
        )
    group = head_module(shape.head.kind).costs(shape).shared_positions
    if layout.sequence and positions % (tensor * group):
        raise UserError(
            f"training.positions={positions} is not a multiple of {tensor * group}, parallel.tensor x the {group} "
            "positions that share draws of the loss (head.target_group of the energy head), which "
            "parallel.sequence=true needs: change one of them."
        )
