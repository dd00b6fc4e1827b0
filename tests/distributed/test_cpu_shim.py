import importlib
from importlib.metadata import version

import pytest
import torch

from calm_core.distributed import cpu_shim as stand_ins
from calm_core.distributed.topology import Topology

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the stand-ins do nothing")


def test_versions_are_those_the_stand_ins_were_written_for() -> None:
    """On failure: check again what these versions take from CUDA, run the parity tests, then change this line."""
    assert (version("megatron-core"), version("deepspeed")) == ("0.16.1", "0.19.8")


@pytest.mark.parametrize("name", stand_ins.MODULES)
def test_each_module_uses_torch_by_that_name_and_sees_the_stand_in(topology: Topology, name: str) -> None:
    module = importlib.import_module(name)
    assert module.torch is not torch
    assert module.torch.zeros(2, device="cuda").device.type == "cpu"
    assert module.torch.zeros(2, device=module.torch.cuda.current_device()).device.type == "cpu"
    assert module.torch.nn is torch.nn


def test_the_global_torch_is_untouched(topology: Topology) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")
    assert torch.cuda.__name__ == "torch.cuda"


def test_recomputation_repeats_the_random_state(topology: Topology) -> None:
    from megatron.core.tensor_parallel.random import checkpoint, get_cuda_rng_tracker

    seen = []

    def draw(x: torch.Tensor) -> torch.Tensor:
        with get_cuda_rng_tracker().fork("a stream"):
            seen.append((torch.rand(3), x))
        seen.append((torch.rand(3), x))
        return 2 * x

    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("a stream", 5)
    x = torch.ones(3, requires_grad=True)
    out = checkpoint(draw, False, x)
    after = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), after)
    first, second = seen[:2], seen[2:]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))
    assert not torch.equal(first[0][0], first[1][0])
