"""Which layouts can hold a model: what would fail later, or run and be wrong, is refused here. No torch."""

from calm_core.errors import UserError
from calm_core.model.config import VOCABULARY_MULTIPLE, ModelShape
from calm_core.parallel.config import ParallelConfig


def check_layout(shape: ModelShape, positions: int, layout: ParallelConfig) -> None:
    """Refuse a layout whose tensor-parallel ranks cannot share this model, or its samples of S positions, evenly.

    Pipeline stages are the matter of `pipeline_split`.

    Raises:
        UserError: naming the key and the mend.
    """
    backbone, tensor = shape.backbone, layout.tensor
    if backbone.key_value_heads % tensor:
        raise UserError(
            f"parallel.tensor={tensor} does not divide the {backbone.key_value_heads} key/value heads of the model "
            "(model.kv_groups, or model.heads where that is 0): choose a divisor of them."
        )
    for name in ("hidden", "ffn"):
        if getattr(backbone, name) % tensor:
            raise UserError(
                f"parallel.tensor={tensor} does not divide model.{name}={getattr(backbone, name)}: change one of them."
            )
    if VOCABULARY_MULTIPLE % tensor:
        raise UserError(
            f"parallel.tensor={tensor} does not divide {VOCABULARY_MULTIPLE}, of which every vocabulary is padded to a "
            "multiple: choose a power of two."
        )
    group = shape.head.positions_together
    if layout.sequence and positions % (tensor * group):
        raise UserError(
            f"training.positions={positions} is not a multiple of {tensor * group}, parallel.tensor x the {group} "
            "positions that share draws of the loss (head.target_group of the energy head), which "
            "parallel.sequence=true needs: change one of them."
        )
