"""Every head, on a backbone, learns a task small enough for a few dozen steps."""

import math
from collections.abc import Iterator

import pytest
import torch
from golden_numbers import RecordedNoise
from torch import Tensor

from calm_core.config.model_config import HEADS, BackboneConfig, HeadConfig, ModelShape
from calm_core.config.training_config import ParallelConfig
from calm_core.distributed.topology import Topology
from calm_core.errors import UserError
from calm_core.model.backbone import transformer_config
from calm_core.model.calm import CalmModel
from calm_core.model.heads import Target
from calm_core.model.noise import SampleNoise
from calm_core.model.parameters import initialize, named_parameters
from calm_core.plan.flops import compression
from calm_core.plan.flops import head as head_weights

V, L, S, B = 16, 4, 12, 8


def build(kind: str, seed: int = 0, k: int = 2) -> CalmModel:
    backbone = BackboneConfig(layers=1, hidden=32, ffn=64, heads=2)
    tokens_only = kind == "softmax"
    head = HeadConfig(kind=kind, noise=8, samples=4, target_samples=8, target_group=4)
    shape = ModelShape(backbone, head, V, k=1 if tokens_only else k, latent=0 if tokens_only else L)
    model = CalmModel(transformer_config(backbone, ParallelConfig()), shape)
    initialize([model], std=0.1, seed=seed)
    return model


def batches(k: int) -> Iterator[tuple[Tensor, Target, SampleNoise]]:
    """Counting modulo 16 from anywhere; the posterior of a chunk is narrow and tells its first token."""
    angle = torch.arange(V) * 2 * math.pi / V
    means = torch.stack([angle.sin(), angle.cos(), (2 * angle).sin(), (2 * angle).cos()], -1)
    generator, sample = torch.Generator().manual_seed(0), 0
    while True:
        start = torch.randint(V, (B, 1), generator=generator)
        chunks = ((start + torch.arange((S + 1) * k)) % V).unflatten(1, (S + 1, k))
        tokens = chunks[:, 1:].transpose(0, 1)
        mean = means[tokens[..., 0]]
        noise = SampleNoise(0, range(sample, sample + B), torch.device("cpu"))
        yield chunks[:, :-1], Target(tokens, mean, torch.full_like(mean, math.log(0.1))), noise
        sample += B


@pytest.mark.parametrize("kind", HEADS)
def test_the_loss_falls_and_the_samples_come_close(topology: Topology, kind: str) -> None:
    model, losses = build(kind), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    stream = batches(model.shape.k)
    for _, (inputs, target, noise) in zip(range(80), stream, strict=False):
        parts = model(inputs, target, noise)
        # The bound of diffusion has rare large values that no parameter changes.
        loss = parts.terms.get("noise_error", parts.loss).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        parts.loss.mean().backward()
        optimizer.step()
    early, late = (sum(part) / len(part) for part in (losses[:5], losses[-10:]))
    print(f"{kind}: loss {early:.3f} -> {late:.3f}")
    assert late < 0.7 * early
    inputs, target, noise = next(stream)
    with torch.no_grad():
        drawn = model.head.sample(model.hidden(inputs), noise, samples=4)[2:]
    if kind == "softmax":
        assert (drawn == target.tokens[2:].unsqueeze(2)).float().mean() > 0.8
    else:
        assert drawn.shape == (S - 2, B, 4, L)
        distance = (drawn - target.mean[2:].unsqueeze(2)).norm(dim=-1).mean().item()
        print(f"{kind}: samples are {distance:.2f} from the posterior's mean")
        assert distance < 0.8  # chunks that follow each other are 1.6 apart, chance is 2


@pytest.mark.parametrize("kind", HEADS)
def test_the_start_is_a_function_of_the_seed_and_as_large_as_planned(topology: Topology, kind: str) -> None:
    model, same, other = build(kind), build(kind), build(kind, seed=1)
    weights = [dict(named_parameters([m])) for m in (model, same, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["compression.embedding.weight"], weights[2]["compression.embedding.weight"])
    padding = 128 * 32 - V * 32 if kind == "softmax" else 0
    assert sum(p.numel() for p in model.head.parameters()) == head_weights(model.shape).parameters + padding


@pytest.mark.parametrize("kind", HEADS)
def test_the_compression_of_one_token_is_left_out_before_softmax_alone(topology: Topology, kind: str) -> None:
    model = build(kind, k=1)
    modules = {name.split(".")[0] for name, _ in model.compression.named_parameters()}
    assert modules == ({"embedding"} if kind == "softmax" else {"embedding", "expand", "reduce", "norm"})
    rows = model.compression.embedding.weight.numel()
    assert sum(p.numel() for p in model.compression.parameters()) == rows + compression(model.shape).parameters


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_the_adaptive_network_starts_by_xavier_and_from_zero(topology: Topology, kind: str) -> None:
    net = build(kind).head.net
    assert net.blocks[0].expand.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.1)
    assert net.hidden_in.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.1)
    for layer in (net.time_in, net.time_out):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not any(layer.weight.any() for layer in (net.blocks[0].modulation, net.out_modulation, net.out))


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_the_loss_is_the_mean_over_independent_draws(topology: Topology, kind: str) -> None:
    head, generator = build(kind).head, torch.Generator().manual_seed(0)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    normal = {name: torch.randn(S, B, 4, L, generator=generator) for name in ("noise", "source", "target")}
    time = torch.rand(S, B, 4, generator=generator)
    draws = {f"{kind}/{name}": drawn for name, drawn in normal.items()}
    draws[f"{kind}/time"] = (1000 * time).long() if kind == "diffusion" else time
    mean = torch.randn(S, B, L, generator=generator)
    target = Target(torch.zeros(S, B, 2, dtype=torch.int64), mean, torch.full_like(mean, -1.0))
    hidden = torch.randn(S, B, 32, generator=generator)
    together = head.loss(hidden, target, RecordedNoise(draws))
    head.samples = 1
    single = [
        head.loss(hidden, target, RecordedNoise({name: drawn[:, :, [n]] for name, drawn in draws.items()}))
        for n in range(4)
    ]
    torch.testing.assert_close(together.loss, torch.stack([one.loss for one in single]).mean(0))
    for name, term in together.terms.items():
        torch.testing.assert_close(term, torch.stack([one.terms[name] for one in single]).mean(0))
    assert not torch.allclose(single[0].loss, single[1].loss)


def test_only_the_energy_score_needs_two_samples() -> None:
    assert {HeadConfig(kind=kind, samples=1).samples for kind in HEADS if kind != "energy"} == {1}
    with pytest.raises(UserError, match=r"head\.samples=1 is too few: head\.kind=energy needs at least 2"):
        HeadConfig(samples=1)
