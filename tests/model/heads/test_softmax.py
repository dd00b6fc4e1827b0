"""The softmax head: losses, log-probabilities and draws, on one rank."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from golden_numbers import RecordedNoise
from live_bytes import LiveBytes, storages
from torch import Tensor

from calm_core.config.model_config import BackboneConfig
from calm_core.config.training_config import ParallelConfig
from calm_core.distributed.topology import Topology
from calm_core.model.backbone import transformer_config
from calm_core.model.heads import Target, softmax
from calm_core.model.heads.softmax import SoftmaxHead
from calm_core.model.noise import SampleNoise

S, B, V, D = 5, 2, 100, 16


@pytest.fixture(scope="module")
def head(topology: Topology) -> SoftmaxHead:
    """100 tokens on a table of 128 rows, whose padding would have nearly all the probability if it were tokens."""
    backbone = BackboneConfig(layers=1, hidden=D, ffn=32, heads=2)
    head = SoftmaxHead(transformer_config(backbone, ParallelConfig()), V)
    torch.manual_seed(0)
    torch.nn.init.normal_(head.out.weight)
    head.out.weight.data[V:] *= 30
    return head


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(S, B, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(V, (S, B), generator=torch.Generator().manual_seed(2))


def noise(draws: Sequence[Sequence[float]] | Tensor) -> RecordedNoise:
    return RecordedNoise({"softmax/sample": torch.as_tensor(draws)})


def test_loss_and_gradients_are_those_of_the_plain_cross_entropy(
    head: SoftmaxHead, hidden: Tensor, tokens: Tensor
) -> None:
    weight = head.out.weight.detach()[:V].clone().requires_grad_()
    theirs, ours = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    expected = F.cross_entropy((theirs @ weight.T).flatten(0, 1), tokens.flatten(), reduction="none").view(S, B)
    each = torch.linspace(1, 2, S * B).view(S, B)
    loss = head.loss(ours, Target(tokens.unsqueeze(-1), weights=each), noise([])).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(-head.log_probabilities(hidden, tokens), expected)
    (loss * each).sum().backward()
    (expected * each).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(head.out.weight.grad[:V], weight.grad)
    assert (head.out.weight.grad[V:] == 0).all()
    head.zero_grad()


def test_the_vocabulary_alone_has_all_the_probability(head: SoftmaxHead, hidden: Tensor) -> None:
    one, every = hidden[:1, :1].expand(V, 1, D), torch.arange(V).unsqueeze(1)
    assert head.log_probabilities(one, every).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_draws_are_the_inverse_of_the_cumulative_distribution(head: SoftmaxHead, hidden: Tensor) -> None:
    probability = torch.softmax((hidden @ head.out.weight[:V].T).double(), -1).detach()
    middles = probability.cumsum(-1) - probability / 2
    tokens = head.sample(hidden, noise(middles), samples=V)
    assert tokens.shape == (S, B, V, 1)
    likely = probability > 1e-5  # the middle of a smaller one is not exact in float32
    assert torch.equal(tokens[..., 0][likely], torch.arange(V).expand(S, B, V)[likely])


def test_the_ends_of_the_unit_interval_are_tokens(head: SoftmaxHead, hidden: Tensor) -> None:
    largest = 1 - 2**-24  # of float32 draws
    tokens = head.sample(hidden, noise(torch.tensor([0.0, largest]).expand(S, B, 2)), samples=2)
    assert ((tokens >= 0) & (tokens < V)).all()


def test_draws_follow_the_distribution(head: SoftmaxHead, hidden: Tensor) -> None:
    streams = SampleNoise(seed=0, samples=[3, 4], device=torch.device("cpu"))
    tokens = head.sample(hidden, streams, samples=20_000).squeeze(-1)
    seen = F.one_hot(tokens, V).double().mean(2)
    probability = torch.softmax((hidden @ head.out.weight[:V].T).double(), -1)
    deviation = (seen - probability).abs() / (probability * (1 - probability) / 20_000).sqrt().clamp(min=1e-4)
    assert deviation.max() < 5


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_draws_by_blocks_of_positions_are_those_of_all_at_once(
    head: SoftmaxHead, hidden: Tensor, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = SampleNoise(seed=0, samples=[3, 4], device=torch.device("cpu"))
    whole = head.sample(hidden, streams, samples=500)
    monkeypatch.setattr(softmax, "PROBABILITY_BYTES", rows * 8 * len(head.out.weight))
    assert torch.equal(head.sample(hidden, streams, samples=500), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_exist_for_a_block_of_positions_at_a_time(
    topology: Topology, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, positions, rows = 4096, 200, 5
    backbone = BackboneConfig(layers=1, hidden=D, ffn=32, heads=2)
    large = SoftmaxHead(transformer_config(backbone, ParallelConfig(), dtype), vocabulary)
    torch.nn.init.normal_(large.out.weight)
    hidden, streams = torch.randn(positions, B, D, dtype=dtype), SampleNoise(0, [3, 4], torch.device("cpu"))
    monkeypatch.setattr(softmax, "PROBABILITY_BYTES", rows * 8 * vocabulary)
    older = storages()
    with LiveBytes(older) as live:
        large.sample(hidden, streams, samples=3)
    logits, block = positions * B * vocabulary * dtype.itemsize, rows * 8 * vocabulary
    assert logits < live.peak < logits + 4 * block
