"""Tools to compare the product with recorded numbers (tests/golden/README.md)."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from calm_core.model.calm import CalmModel
from calm_core.model.parameters import named_parameters, pieces
from calm_core.reference.names import calm_to_ours

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-5  # of a tensor's largest value


class RecordedNoise:
    """A `Noise` that plays back draws `[rows, B, *shape]` by the names of their streams."""

    def __init__(self, draws: Mapping[str, Tensor]) -> None:
        self.draws = draws

    def uniform(self, name: str, rows: int, *shape: int) -> Tensor:
        return self._recorded(name, rows, *shape)

    def normal(self, name: str, rows: int, *shape: int) -> Tensor:
        return self._recorded(name, rows, *shape)

    def integers(self, name: str, high: int, rows: int, *shape: int) -> Tensor:
        draws = self._recorded(name, rows, *shape)
        assert draws.min() >= 0
        assert draws.max() < high
        return draws

    def _recorded(self, name: str, rows: int, *shape: int) -> Tensor:
        draws = self.draws[name]
        assert (draws.shape[0], *draws.shape[2:]) == (rows, *shape)
        return draws


def assert_close(name: str, ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape, name
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"{name}: largest difference {error:.1e} of the largest value")
    assert error <= TOLERANCE, name


def load_reference(model: CalmModel, reference: Mapping[str, Tensor]) -> None:
    """Put the reference's weights into a model, all of them."""
    ours = calm_to_ours(reference, model.shape)
    for name, parameter in named_parameters([model]):
        for piece in pieces(name, parameter):
            piece.of(parameter.data).copy_(ours.pop(piece.name))
    assert not ours
