"""Parameters that data-parallel ranks fill together."""

import pytest
import torch
from torch import nn

from calm_core.model import parameters
from calm_core.model.parameters import from_owners, initialize


def model() -> nn.Module:
    sizes = [300, 64, 64, 64, 64, 8, 8]
    built = nn.Module()
    for number, size in enumerate(sizes):
        built.register_parameter(f"weight{number}", nn.Parameter(torch.zeros(size, 16)))
    return built


@pytest.mark.parametrize("size", [1, 2, 8])
def test_every_piece_has_one_owner_and_the_work_is_shared(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    sent: list[int] = []
    monkeypatch.setattr(parameters.dist, "broadcast", lambda tensor, source, group: sent.append(source))
    monkeypatch.setattr(parameters.dist, "get_global_rank", lambda group, rank: rank)
    filled: dict[int, list[str]] = {}
    elements = []
    for rank in range(size):
        monkeypatch.setattr(parameters, "_data_group", lambda rank=rank: (None, rank, size))
        own = filled.setdefault(rank, [])
        numbers = []
        from_owners([model()], lambda piece, p, own=own, n=numbers: (own.append(piece.name), n.append(p.numel())))
        elements.append(sum(numbers))
    names = sorted(name for own in filled.values() for name in own)
    assert names == [f"weight{number}" for number in range(7)]
    total, largest = sum(elements), 300 * 16
    assert max(elements) <= total / size + largest
    assert len(sent) == (7 * size if size > 1 else 0)


def test_initial_weights_do_not_depend_on_who_draws_them(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = model(), [model(), model()]
    initialize([whole], 0.02, seed=3)
    monkeypatch.setattr(parameters.dist, "broadcast", lambda *_: None)
    monkeypatch.setattr(parameters.dist, "get_global_rank", lambda *_: 0)
    for rank, part in enumerate(parts):
        monkeypatch.setattr(parameters, "_data_group", lambda rank=rank: (None, rank, 2))
        initialize([part], 0.02, seed=3)
    for one, first, second in zip(whole.parameters(), parts[0].parameters(), parts[1].parameters(), strict=True):
        assert torch.equal(one, first + second)
        assert not (first.any() and second.any())


def test_matrices_that_start_by_their_inputs_keep_the_scale_of_what_they_read() -> None:
    built = model()
    initialize([built], 0, seed=3)
    for weight in built.parameters():
        assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.2)
