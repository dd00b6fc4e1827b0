"""Checkpoints against an engine of another shape or precision, on one rank."""

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calm_core.errors import UserError
from calm_core.model.calm import CalmModel
from calm_core.model.config import BackboneConfig, HeadConfig, ModelShape
from calm_core.model.megatron import transformer_config
from calm_core.model.parameters import initialize, named_parameters
from calm_core.parallel import checkpoint
from calm_core.parallel.checkpoint_folder import open_checkpoint
from calm_core.parallel.config import ParallelConfig
from calm_core.parallel.engine import Engine
from calm_core.parallel.optimizer import OptimizerConfig
from calm_core.parallel.topology import Topology


def model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: int) -> CalmModel:
    backbone = BackboneConfig(**{"layers": 2, "hidden": 16, "ffn": 24, "heads": 2, **changes})
    shape = ModelShape(backbone, HeadConfig(noise=4), vocabulary=50, k=2, latent=4)
    built = CalmModel(transformer_config(backbone, ParallelConfig(), dtype), shape)
    initialize([built], 0.1, seed)
    return built


def engine(topology: Topology, *arguments: object, **changes: object) -> Engine:
    return Engine([model(*arguments, **changes)], OptimizerConfig(), topology)


def stepped(topology: Topology, dtype: torch.dtype) -> Engine:
    """An engine after three updates by random gradients."""
    one = engine(topology, 0, dtype)
    one_more_steps(one, 3)
    return one


def one_more_steps(one: Engine, steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        for parameter in one.chunks[0].parameters():
            factor = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            (parameter * factor).sum().backward()
        assert one.step(1e-2, lambda norm: True).applied


def state(one: Engine) -> list[Tensor]:
    masters = [flat for group in one.optimizer.optimizer.param_groups for flat in group["params"]]
    moments = [value for each in one.optimizer.optimizer.state.values() for value in each.values()]
    return [x.detach().clone() for x in (*one.chunks[0].parameters(), *masters, *moments)]


@pytest.fixture
def saved(topology: Topology, tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path, 3, stepped(topology, torch.float32), {"updates": 3}, keep=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_of_an_engine_comes_back_bitwise(topology: Topology, tmp_path: Path, dtype: torch.dtype) -> None:
    first, second = stepped(topology, dtype), engine(topology, 1, dtype)
    path = checkpoint.save(tmp_path, 3, first, {"updates": 3}, keep=2)
    assert not all(map(torch.equal, state(first), state(second)))
    checkpoint.load(open_checkpoint(path), second)
    assert all(map(torch.equal, state(first), state(second)))
    one_more_steps(first, 2)
    one_more_steps(second, 2)
    assert all(map(torch.equal, state(first), state(second)))


@pytest.mark.parametrize(("code", "kind"), [(errno.EIO, RuntimeError), (errno.EACCES, UserError)])
def test_what_cannot_be_read_is_no_damage(
    saved: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    def unreadable(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoint, "damaged_files", unreadable)
    with pytest.raises(kind, match=os.strerror(code)) as refused:
        checkpoint.verify(open_checkpoint(saved))
    assert refused.type is kind


def test_weights_alone(topology: Topology, saved: Path) -> None:
    other = model(1)
    names = checkpoint.load_weights(open_checkpoint(saved), [other])
    assert names == [name for name, _ in named_parameters([other])]
    wanted = stepped(topology, torch.float32).chunks[0]
    assert all(map(torch.equal, other.parameters(), wanted.parameters()))


def test_a_part_of_the_weights(topology: Topology, saved: Path) -> None:
    other, before, wanted = model(1), model(1), stepped(topology, torch.float32).chunks[0]
    names = checkpoint.load_weights(open_checkpoint(saved), [other], only="backbone.")
    assert all(name.startswith("backbone.") for name in names)
    for (name, found), old, new in zip(other.named_parameters(), before.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(found, new if name.startswith("backbone.") else old)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ffn": 32}, r"holds weight/backbone\.layers\.0\.mlp\.linear_fc1\.weight\.gate with shape \(24, 16\) where"),
        ({"layers": 3}, r"has no tensor weight/backbone\.layers\.2\.\S+: it holds a model of another shape"),
    ],
)
def test_another_shape_is_refused_and_named(
    topology: Topology, saved: Path, changes: dict[str, int], words: str
) -> None:
    other = engine(topology, 1, **changes)
    before = state(other)
    with pytest.raises(UserError, match=words):
        checkpoint.load(open_checkpoint(saved), other)
    assert all(map(torch.equal, before, state(other)))
