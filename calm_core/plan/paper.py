"""The paper's table of models beside this project's closed forms."""

from collections.abc import Mapping
from dataclasses import dataclass

from calm_core.config.model_config import ModelShape
from calm_core.model.heads.registry import head_module
from calm_core.plan import flops
from calm_core.plan.flops import AutoencoderShape


@dataclass(frozen=True)
class Row:
    """A line of the paper's table: parameters, FLOPs of the whole training, FLOPs of inference per token."""

    name: str
    parameters: float
    training: float
    inference: float


# By the name of the configuration that describes the model.
ROWS = {
    "ar_s": Row("Transformer-S", 281e6, 6.6e20, 4.4e8),
    "ar_m": Row("Transformer-M", 465e6, 11.9e20, 7.9e8),
    "ar_l": Row("Transformer-L", 849e6, 22.5e20, 15.0e8),
    "calm_m": Row("CALM-M", 371e6, 3.7e20, 2.9e8),
    "calm_l": Row("CALM-L", 735e6, 7.7e20, 4.6e8),
    "calm_xl": Row("CALM-XL", 1.82e9, 19.5e20, 9.4e8),
}

TOLERANCE = 0.05  # of FLOPs, beyond which the table says what assumption is missing


def ours(shape: ModelShape, autoencoder: AutoencoderShape | None) -> tuple[float, float, float]:
    """Parameters, training FLOPs and inference FLOPs of a model, in the paper's accounting."""
    decoder = None if shape.head.reads_tokens else autoencoder
    sizes = flops.parameters(shape).values()
    return sum(sizes), flops.paper_training(shape), flops.paper_inference(shape, decoder)


def missing_head(shape: ModelShape, training: float) -> float:
    """How much lighter the head would have to be, as a share, for the paper's accounting to give these FLOPs."""
    costs = head_module(shape.head.kind).costs(shape)
    head = costs.weights.forward * costs.training_evaluations * 3 * flops.PAPER_TOKENS / shape.k
    return (flops.paper_training(shape) - training) / head


def comparison(models: Mapping[str, tuple[ModelShape, AutoencoderShape]]) -> str:
    """The table as text: for each configuration of `ROWS` the paper's figures, ours, and their ratios."""
    columns = ("parameters, M", "training, e20 FLOPs", "inference, e8 FLOPs/token")
    lines = [
        f"{'':<15}" + "".join(f"{title:>27}" for title in columns),
        f"{'':<15}" + f"{'paper   ours  ratio':>27}" * 3,
    ]
    notes = []
    for name, (shape, autoencoder) in models.items():
        row = ROWS[name]
        theirs, found = (row.parameters, row.training, row.inference), ours(shape, autoencoder)
        cells = [
            f"{paper / unit:>14.1f}{mine / unit:>7.1f}{mine / paper:>6.3f}"
            for paper, mine, unit in zip(theirs, found, (1e6, 1e20, 1e8), strict=True)
        ]
        lines.append(f"{row.name:<15}" + "".join(cells))
        if abs(found[1] / row.training - 1) > TOLERANCE:
            notes.append(
                f"{row.name}: its shape is ours, for the paper gives its size alone; its training FLOPs would need a "
                f"head {missing_head(shape, row.training):.0%} lighter than ours, {shape.head.samples} samples of it."
            )
    return "\n".join([*lines, *notes])
