"""The output layer against all logits: cross-entropy, what of it is alive at a time, sampling, most probable tokens."""

import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes, storages
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from calm_core.model import output_layer, pointwise
from calm_core.model.output_layer import (
    argmax,
    linear_cross_entropy,
    log_probability,
    mean_cross_entropy,
    most_probable,
    sampled_cross_entropy,
)

N, R, ROWS, V = 23, 8, 64, 50
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, a matrix with rows that are not tokens but would be the most probable ones, targets, counts."""
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
    assert output_layer.logit_rows(128_384, "cuda") == 4181
    assert output_layer.logit_rows(512, "cpu") == 512
    assert output_layer.logit_rows(128_384, "cpu") == 64


def small_problem(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 8, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(50, (23,), generator=generator)


@pytest.mark.parametrize("rows", [1, 10, 1024])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_the_mean_and_its_gradients_are_those_of_all_logits(dtype, tolerance, rows):
    hidden, weight, targets = small_problem(dtype)
    exact = F.cross_entropy(hidden.double() @ weight.double().T, targets)
    expected = torch.autograd.grad(3 * exact, (hidden, weight))
    loss = mean_cross_entropy(hidden, weight, targets, rows=rows)
    gradients = torch.autograd.grad(3 * loss, (hidden, weight))
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss.double(), exact, rtol=tolerance, atol=tolerance)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, reference, rtol=tolerance, atol=tolerance * reference.abs().max().item())


class Products(TorchDispatchMode):
    """The sizes of every matrix that enters or leaves a product."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.mm:
            self.sizes |= {size for matrix in (*args[:2], out) for size in matrix.shape}
        return out


def test_products_run_on_a_padded_vocabulary():
    hidden, weight, targets = small_problem(torch.float32)
    with Products() as seen:
        mean_cross_entropy(hidden, weight, targets)
    assert seen.sizes == {23, 8, 128}


def test_without_gradients_the_mean_is_the_same():
    hidden, weight, targets = small_problem(torch.float64)
    loss = mean_cross_entropy(hidden, weight, targets)
    with torch.no_grad():
        quiet = mean_cross_entropy(hidden, weight, targets, rows=7)
    torch.testing.assert_close(quiet, loss)
    assert not quiet.requires_grad


def samples(targets, vocabulary=9, width=5):
    """Inputs `[B, n, width]` float64, a table, targets `[B, n]` and a random order of the tokens for each sample."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.tensor(targets)
    hidden = torch.randn(*targets.shape, width, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).requires_grad_()
    return hidden, weight, targets, torch.rand(len(targets), vocabulary, generator=generator)


def test_a_sample_of_the_whole_vocabulary_gives_the_exact_loss_and_gradients():
    hidden, weight, targets, keys = samples([[3, 3, 0], [8, 1, 2]])
    exact = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten())
    loss = sampled_cross_entropy(hidden, weight, targets, keys, count=9)
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)
    for found, expected in zip(*(torch.autograd.grad(2 * x, (hidden, weight)) for x in (loss, exact)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_sampled_softmax_runs_over_the_own_tokens_and_those_of_the_lowest_keys():
    hidden, weight, targets, keys = samples([[3, 3, 0], [8, 1, 2]])
    logits, others = hidden @ weight.T, [keys[0].tolist(), keys[1].tolist()]
    losses = []
    for sample, own in enumerate(({0, 3}, {1, 2, 8})):
        drawn = sorted(set(range(9)) - own, key=others[sample].__getitem__)[: 6 - len(own)]
        offsets = torch.full((9,), -torch.inf, dtype=torch.float64)
        offsets[list(own)], offsets[drawn] = 0, math.log((9 - len(own)) / len(drawn))
        losses.append(F.cross_entropy(logits[sample] + offsets, targets[sample]))
    expected = torch.stack(losses).mean()
    loss = sampled_cross_entropy(hidden, weight, targets, keys, count=6)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)  # the offsets are float32
    for found, reference in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("drawn", [1, 2, 5])
def test_over_all_draws_the_denominator_is_that_of_the_whole_softmax(drawn):
    hidden, weight, targets, keys = samples([[4]], vocabulary=7)
    logits = (hidden @ weight.T).flatten().detach()
    denominators = []
    for chosen in combinations([v for v in range(7) if v != 4], drawn):
        low = torch.ones_like(keys).index_fill(1, torch.tensor(chosen), 0.0)
        loss = sampled_cross_entropy(hidden, weight, targets, low, count=1 + drawn)
        denominators.append((loss + logits[4]).exp())
    torch.testing.assert_close(torch.stack(denominators).mean(), logits.exp().sum(), rtol=1e-7, atol=0)


TABLE, WIDTH = 2000, 24  # of the table that is searched


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(TABLE, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("width", [1, 127, 128, 129, 1000])
def test_argmax_is_the_first_of_the_largest(width: int) -> None:
    logits = torch.randint(40, (500, width), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(argmax(logits), logits.argmax(-1))


@pytest.mark.parametrize("logits_at_once", [1, 300 * 7, 300 * 128, 1 << 21])
def test_the_most_probable_tokens_are_those_of_all_logits(
    weight: torch.Tensor, logits_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_layer, "LOGITS_AT_ONCE", logits_at_once)
    features = torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(1))
    assert torch.equal(most_probable(features, weight), (features.double() @ weight.double().T).argmax(-1))


def test_of_equal_rows_of_the_table_the_first_is_taken(weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_layer, "LOGITS_AT_ONCE", 50 * 100)  # the two in different parts
    weight[1500] = weight[70]
    assert (most_probable(weight[70].expand(50, WIDTH), weight) == 70).all()


def test_log_probability_is_that_of_the_softmax(weight: torch.Tensor) -> None:
    features = torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    expected = (features @ weight.double().T).log_softmax(-1)[:, 7]
    assert torch.allclose(log_probability(features, weight.double(), 7), expected, rtol=0, atol=1e-12)
