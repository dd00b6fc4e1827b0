"""What the ranks of a layout did, put together as the one model they are, and compared with another layout."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Differences(NamedTuple):
    """How far a layout is from the single process.

    Attributes:
        loss: largest relative difference over the steps.
        norm: likewise of the gradient norm.
        gradient: largest difference in the last step's gradients, relative to the largest entry of each tensor.
        weight: largest difference in the final weights, at steps of 1e-3.
        replicas: largest difference between copies that ranks hold of the same tensor.
    """

    loss: float
    norm: float
    gradient: float
    weight: float
    replicas: float


# Of `Differences`; copies are equal to the bit. A weight in bf16 is off by its last digit, which tells little: a sum
# of gradients that is missing shows in the norm (0.05 and more), the gradients (0.5 and more) or the copies.
TOLERANCES = Differences(loss=5e-7, norm=3e-6, gradient=2e-5, weight=2e-5, replicas=0.0)
TOLERANCES_BF16 = Differences(loss=1e-4, norm=2e-3, gradient=0.15, weight=1e-2, replicas=0.0)


def compared(found: dict[str, Any], wanted: dict[str, Any]) -> Differences:
    """The differences between two records; a resumed run has the last steps only."""
    loss, norm = (
        max(abs(a / b - 1) for a, b in zip(found[key], wanted[key][-len(found[key]) :], strict=True))
        for key in ("loss", "norm")
    )
    assert found["gradients"].keys() == found["weights"].keys() == wanted["gradients"].keys()
    gradient = max(
        ((found["gradients"][key] - g).abs().max() / g.abs().max()).item() for key, g in wanted["gradients"].items()
    )
    weight = max((found["weights"][key] - w).abs().max().item() for key, w in wanted["weights"].items())
    return Differences(loss, norm, gradient, weight, max(found["replicas"].values()))


def assembled(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The records of all ranks as those of the one model they are."""
    first = ranks[0]
    whole = {kind: _whole_tensors(ranks, kind) for kind in ("gradients", "weights")}
    stages = {name: {rank["place"].pipeline for rank in ranks if name in rank["weights"]} for name in whole["weights"]}
    return {
        **{key: first[key] for key in ("loss", "norm", "evaluation")},
        **whole,
        "agreed": all(rank["loss"] == first["loss"] and rank["norm"] == first["norm"] for rank in ranks),
        "replicas": {kind: _largest_spread(ranks, kind) for kind in ("gradients", "weights")},
        "shared between stages": sorted(name for name, of in stages.items() if len(of) > 1),
        "noise": {rank["place"][:2]: rank["noise"] for rank in ranks if rank["place"].last},
        "refused": all(all(rank["refused"]) for rank in ranks),
        "columns": [rank["columns"] for rank in ranks],
    }


def _whole_tensors(ranks: list[dict[str, Any]], kind: str) -> dict[str, Tensor]:
    """Global tensors: shards joined over tensor-parallel ranks, the mean over data-parallel ranks."""
    shards: dict[str, dict[int, dict[int, tuple[int | None, Tensor]]]] = {}
    for rank in ranks:
        place = rank["place"]
        for name, shard in rank[kind].items():
            shards.setdefault(name, {}).setdefault(place.data, {})[place.tensor] = shard
    return {name: torch.stack([_joined(copy) for copy in copies.values()]).mean(0) for name, copies in shards.items()}


def _joined(shards: dict[int, tuple[int | None, Tensor]]) -> Tensor:
    dim, tensor = shards[0]
    return tensor if dim is None else torch.cat([shards[rank][1] for rank in sorted(shards)], dim)


def _largest_spread(ranks: list[dict[str, Any]], kind: str) -> float:
    """The largest difference between copies that must be equal: of tensor-parallel ranks, and weights of all."""
    copies: dict[Any, list[Tensor]] = {}
    for rank in ranks:
        place = rank["place"]
        for name, (dim, tensor) in rank[kind].items():
            data = place.data if kind == "gradients" else None
            copies.setdefault((name, data, None if dim is None else place.tensor), []).append(tensor)
    return max((copy - group[0]).abs().max().item() for group in copies.values() for copy in group)
