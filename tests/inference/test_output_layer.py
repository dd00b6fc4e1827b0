"""The search for the most probable token against the search through all logits."""

import pytest
import torch

from calm_core.inference import output_layer
from calm_core.inference.output_layer import OutputLayer, argmax

V, D = 2000, 24


@pytest.mark.parametrize("width", [1, 127, 128, 129, 1000])
def test_argmax_is_the_first_of_the_largest(width: int) -> None:
    logits = torch.randint(40, (500, width), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(argmax(logits), logits.argmax(-1))


@pytest.mark.parametrize("spread", [0, 0.03, 0.1, 0.3, 3])
@pytest.mark.parametrize("crowds", [1, 3])
def test_the_most_probable_tokens_are_those_of_all_logits(spread: float, crowds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = OutputLayer(torch.randn(V, D, generator=generator))
    centers = torch.randn(crowds, D, generator=generator).repeat_interleave(200 // crowds, 0)
    features = centers + spread * torch.randn(centers.shape, generator=generator)
    logits = features.double() @ layer.weight.double().T
    found = layer.most_probable(features)
    print(f"{len(found.unique())} tokens")
    assert torch.equal(found, logits.argmax(-1))


def test_a_crowd_needs_few_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(output_layer, "argmax", lambda logits: compared.append(logits.shape) or argmax(logits))
    generator = torch.Generator().manual_seed(0)
    layer = OutputLayer(torch.randn(V, D, generator=generator))
    crowd = torch.randn(1, D, generator=generator) + 0.01 * torch.randn(200, D, generator=generator)
    others = 3 * torch.randn(40, D, generator=generator)
    layer.most_probable(torch.cat([others, crowd]))
    (crowd_rows, tokens), (other_rows, every) = compared
    assert (crowd_rows, other_rows, every) == (200, 40, V)
    assert tokens < V / 50


def test_equal_rows_of_the_table_are_told_apart_by_their_order() -> None:
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    weight[1500] = weight[70]
    assert (OutputLayer(weight).most_probable(weight[70].expand(50, D)) == 70).all()
