"""The diffusion and flow heads against numbers of the public reference implementation, in float32."""

from dataclasses import replace

import pytest
import torch
from golden_numbers import TOLERANCE, RecordedNoise, assert_close, load_reference
from torch import Tensor

from calm_core.config.model_config import HeadConfig, ModelShape
from calm_core.config.training_config import ParallelConfig
from calm_core.distributed.topology import Topology
from calm_core.model.backbone import transformer_config
from calm_core.model.calm import CalmModel
from calm_core.model.heads import Target
from calm_core.model.heads.diffusion import diffused
from calm_core.plan.flops import head as head_weights
from calm_core.reference.names import HEAD, calm_to_ours, calm_to_theirs

Numbers = dict[str, Tensor]


@pytest.fixture(scope="module", params=["diffusion", "flow"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(topology: Topology, shape: ModelShape, reference: Numbers, weights: Numbers, kind: str) -> CalmModel:
    """The golden backbone with the head of this kind."""
    shape = replace(shape, head=HeadConfig(kind=kind, blocks=shape.head.blocks, samples=1))
    model = CalmModel(transformer_config(shape.backbone, ParallelConfig()), shape)
    load_reference(model, with_head(reference, weights, kind))
    return model.requires_grad_(False)


@pytest.fixture
def recorded(golden: Numbers, kind: str) -> Numbers:
    """The numbers of this head: the rows are positions of one sequence, `[S, 1, ...]`."""
    named = {name.removeprefix(f"{kind}/"): x for name, x in golden.items() if name.startswith(f"{kind}/")}
    return {name: x.unsqueeze(1) if len(x) == 6 else x for name, x in named.items()}


def with_head(reference: Numbers, weights: Numbers, kind: str) -> Numbers:
    backbone = {name: w for name, w in reference.items() if not name.startswith(HEAD)}
    prefix = f"{kind}.{HEAD}"
    return backbone | {name.removeprefix(f"{kind}."): w for name, w in weights.items() if name.startswith(prefix)}


def certain(target: Tensor) -> Target:
    """A posterior without width: every draw is `target`."""
    tokens = torch.zeros(len(target), 1, 4, dtype=torch.int64)
    return Target(tokens, target, torch.full_like(target, -torch.inf))


def test_loss(model: CalmModel, recorded: Numbers, kind: str) -> None:
    draws = {
        "diffusion": {"diffusion/time": "t", "diffusion/noise": "noise", "diffusion/target": "target"},
        "flow": {"flow/time": "t", "flow/source": "x0", "flow/target": "target"},
    }[kind]
    noise = RecordedNoise({stream: recorded[name].unsqueeze(2) for stream, name in draws.items()})
    loss = model.head.loss(recorded["z"], certain(recorded["target"]), noise).loss
    theirs = recorded["losses" if kind == "diffusion" else "loss"]
    assert_close(f"{kind} loss", loss, theirs)
    # Rows differ in size by two orders: each by itself is as close.
    assert ((loss - theirs).abs() / theirs).max() <= TOLERANCE


def test_network(model: CalmModel, recorded: Numbers, kind: str) -> None:
    """Recorded at the targets themselves."""
    net, t = model.head.net, recorded["t"]
    time = t if kind == "diffusion" else (t * 1000).floor()
    output = net(recorded["target"].unsqueeze(2), time.unsqueeze(2), net.condition(recorded["z"])).squeeze(2)
    assert_close(f"{kind} network", output, recorded["net_out" if kind == "diffusion" else "velocity"])


def test_samples_of_one_position_do_not_mix(model: CalmModel, recorded: Numbers) -> None:
    net, condition = model.head.net, model.head.net.condition(recorded["z"])
    x, time = torch.randn(6, 1, 3, 8, generator=torch.Generator().manual_seed(0)), torch.full((1, 1, 1), 250)
    together = net(x, time, condition)
    one_by_one = torch.cat([net(x[:, :, [n]], time.expand(6, 1, 1), condition) for n in range(3)], dim=2)
    torch.testing.assert_close(together, one_by_one)


@pytest.mark.parametrize("kind", ["flow"], indirect=True, scope="module")
def test_flow_samples(model: CalmModel, recorded: Numbers) -> None:
    noise = RecordedNoise({"flow/start": recorded["sample_x0"].unsqueeze(2)})
    samples = model.head.sample(recorded["z"], noise, samples=1).squeeze(2)
    assert_close("flow sample", samples, recorded["sample_midpoint20"])


@pytest.mark.parametrize("kind", ["diffusion"], indirect=True, scope="module")
def test_diffusion_levels(model: CalmModel, recorded: Numbers) -> None:
    schedule = model.head.schedule
    assert_close("signal levels", schedule.signal.float(), recorded["alphas_cumprod"])
    x_t = diffused(schedule.at(recorded["t"]), recorded["target"], recorded["noise"])
    assert_close("noisy latents", x_t, recorded["x_t"])


def test_names_go_both_ways(model: CalmModel, reference: Numbers, weights: Numbers, kind: str) -> None:
    theirs = with_head(reference, weights, kind)
    back = calm_to_theirs(calm_to_ours(theirs, model.shape), model.shape)
    assert all(torch.equal(tensor, theirs.pop(name)) for name, tensor in back.items())
    assert not theirs


def test_size_is_what_the_closed_form_says(model: CalmModel) -> None:
    assert sum(p.numel() for p in model.head.parameters()) == head_weights(model.shape).parameters
