"""The cross-entropy by blocks against that of all logits, and what of it is alive at a time."""

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes, storages
from torch import Tensor

from calm_core.model import linear_cross_entropy as module
from calm_core.model import pointwise
from calm_core.model.linear_cross_entropy import linear_cross_entropy

N, R, ROWS, V = 23, 8, 64, 50
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, a matrix with rows that are no tokens and would have the most probability, targets, counts."""
    generator = torch.Generator().manual_seed(0)
    features, weight = (torch.randn(rows, R, generator=generator) for rows in (N, ROWS))
    weight[V:] *= 30
    targets = torch.randint(V, (N,), generator=generator)
    counts = torch.linspace(0, 2, N)
    return features.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, counts


def plain(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(features.double() @ weight[:V].double().T, targets, reduction="none")


@pytest.mark.parametrize("rows", [1, 10, 1024])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_losses_and_gradients_are_those_of_all_logits(dtype: torch.dtype, rows: int) -> None:
    features, weight, targets, counts = problem(dtype)
    expected = plain(features, weight, targets)
    found = linear_cross_entropy(features, weight, targets, counts=counts, vocabulary=V, rows=rows)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    wanted = torch.autograd.grad((expected * counts).sum() * 0.3, (features, weight))
    gradients = torch.autograd.grad((found * counts).sum() * 0.3, (features, weight))
    for gradient, reference in zip(gradients, wanted, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, reference, rtol=tolerance, atol=tolerance * reference.abs().max().item())
    assert (gradients[1][V:] == 0).all()


def test_a_gradient_that_is_not_that_of_the_counts_is_refused() -> None:
    features, weight, targets, counts = problem(torch.float32)
    for given, asked in ((counts, torch.ones(N)), (None, counts)):
        loss = linear_cross_entropy(features, weight, targets, counts=given, vocabulary=V)
        with pytest.raises(RuntimeError, match="not proportional"):
            (loss * asked).sum().backward()


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_has_such_a_gradient(factor: float) -> None:
    features, weight, targets, counts = problem(torch.float32)
    loss = linear_cross_entropy(features, weight, targets, counts=counts, vocabulary=V)
    ((loss * counts).sum() * factor).backward()
    assert not features.grad.isfinite().any()


def test_counts_of_zero_alone_have_no_gradient() -> None:
    features, weight, targets, counts = problem(torch.float32)
    loss = linear_cross_entropy(features, weight, targets, counts=0 * counts, vocabulary=V)
    (loss * 0).sum().backward()
    assert not features.grad.any()
    assert not weight.grad.any()


def test_a_certain_token_costs_nothing_and_an_impossible_one_is_finite() -> None:
    weight = torch.tensor([[100.0], [-100.0], [0.0]], requires_grad=True)
    loss = linear_cross_entropy(torch.ones(2, 1), weight, torch.tensor([0, 1]))
    assert loss.tolist() == [0, 200]
    loss.sum().backward()
    assert weight.grad.flatten().tolist() == pytest.approx([1, -1, 0], abs=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_a_block_are_alive_and_none_are_kept(dtype: torch.dtype) -> None:
    n, vocabulary, r, rows = 600, 2048, 4, 20
    features = torch.randn(n, r, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, r, dtype=dtype, requires_grad=True)
    targets, older = torch.randint(vocabulary, (n,)), storages()
    with LiveBytes(older) as live:
        loss = linear_cross_entropy(features, weight, targets, rows=rows).mean()
        kept = live.now
        loss.backward()
    block, of_inputs = 4 * rows * vocabulary, 3 * 4 * vocabulary * r + 8 * n * (r + 4)
    assert kept < of_inputs
    assert block < live.peak < 4 * block + of_inputs < 4 * n * vocabulary / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traced_whole_it_is_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tracer alone, without generated code."""
    traced = set()

    def trace(function):
        traced.add(function.__name__)
        return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)

    monkeypatch.setattr(pointwise, "compiled", trace)
    features, weight, targets, counts = problem(dtype)
    both = []
    for compiled in (False, True):
        loss = linear_cross_entropy(features, weight, targets, counts=counts, vocabulary=V, rows=10, compiled=compiled)
        both.append((loss, *torch.autograd.grad((loss * counts).sum(), (features, weight))))
        assert bool(traced) == compiled
    assert traced == {"softmax_sums", "softmax_slope"}
    for eager, found in zip(*both, strict=True):
        torch.testing.assert_close(found, eager)


def test_the_block_is_that_of_the_device() -> None:
    assert module.logit_rows(128_384, "cuda") == 4181
    assert module.logit_rows(512, "cpu") == 512
    assert module.logit_rows(128_384, "cpu") == 64
