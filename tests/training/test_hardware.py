import pytest
import torch
from torch import Tensor

from calm_core.training.hardware import deterministic


def test_it_is_on_within_the_block_alone() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU gives the same bits anyway")
def test_a_gpu_adds_in_one_order() -> None:
    """Gradients of an embedding whose rows are used thousands of times each: atomic additions without the switch."""

    def gradient() -> Tensor:
        generator = torch.Generator("cuda").manual_seed(0)
        table = torch.zeros(8, 64, device="cuda", requires_grad=True)
        rows = torch.randint(8, (200_000,), device="cuda", generator=generator)
        (table[rows] * torch.randn(200_000, 64, device="cuda", generator=generator)).sum().backward()
        return table.grad

    with deterministic(True):
        assert torch.equal(gradient(), gradient())
