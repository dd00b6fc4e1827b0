"""Ranks that cannot find a place."""

import pytest
import torch

from calm_core.config.parallel_config import ParallelConfig
from calm_core.distributed.topology import distributed
from calm_core.errors import UserError


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
