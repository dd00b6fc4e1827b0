"""Ranks that cannot find a place."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from calm_core.config.training_config import ParallelConfig
from calm_core.distributed import topology as topology_module
from calm_core.distributed.collectives import meet
from calm_core.distributed.topology import distributed
from calm_core.errors import UserError


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test lets `distributed` set for a machine with CUDA must not reach the processes that others start."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"2 GPUs .*local rank 2.*--nproc-per-node 2"), distributed(ParallelConfig()):
        pass


def test_a_world_that_the_layout_does_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    layout = ParallelConfig(tensor=2, pipeline=2)
    with pytest.raises(UserError, match=r"6 ranks .* start a multiple of 4"), distributed(layout):
        pass


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, r"has WORLD_SIZE=2 but no RANK, MASTER_ADDR, MASTER_PORT: start the ranks with torchrun"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, r"has RANK=1, WORLD_SIZE=2 but no MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "MASTER_ADDR": "here"}, "has RANK=0 but no WORLD_SIZE, MASTER_PORT"),
    ],
)
def test_half_a_world_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words), distributed(ParallelConfig()):
        pass


def test_a_world_of_one_needs_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with distributed(ParallelConfig()) as topology:
        assert (topology.rank, topology.world) == (0, 1)
    assert (os.environ["RANK"], "MASTER_ADDR" in os.environ) == ("0", False)


def test_connections_are_limited_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def set_device(device: torch.device) -> None:
        found.append(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
        raise KeyboardInterrupt

    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with pytest.raises(KeyboardInterrupt), distributed(ParallelConfig()):
        pass
    assert found == ["1"]


def test_the_timeout_reaches_every_group_and_no_group_is_made_twice() -> None:
    from calm_core.megatron import parallel_state

    with distributed(ParallelConfig(timeout_minutes=7)):
        groups = [group for group in dist.distributed_c10d._world.pg_map if group is not None]
        timeouts = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
        assert len(groups) > 5
        assert timeouts == {timedelta(minutes=7)}
        assert parallel_state._DATA_PARALLEL_GROUP_GLOO is None


def test_ranks_meet_on_their_own_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL warns, on every rank, where it has to guess the device."""
    asked = []
    monkeypatch.setattr(dist, "barrier", lambda **how: asked.append(how))
    for device in ("cuda:3", "cpu"):
        meet(torch.device(device))
    assert asked == [{"device_ids": [3]}, {"device_ids": None}]


@pytest.mark.parametrize(("world", "left"), [(1, ["left"]), (2, [])])
def test_a_rank_that_fails_does_not_wait_for_the_others_to_leave(
    monkeypatch: pytest.MonkeyPatch, world: int, left: list[str]
) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    calls = []
    with pytest.raises(RuntimeError, match="failed"), topology_module._leaving(lambda: calls.append("left")):
        raise RuntimeError("failed")
    assert calls == left
    with topology_module._leaving(lambda: calls.append("left")):
        pass
    assert calls == [*left, "left"]
