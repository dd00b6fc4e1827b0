"""Replacements on the CPU for the parts of CUDA that Megatron-core 0.16.1 and DeepSpeed 0.19.8 use unconditionally.

Megatron-core names `torch.cuda` inside modules that otherwise run on any device. On a machine without CUDA those
modules, and only those, get a `torch` whose factory functions create "cuda" tensors on the CPU and whose `cuda` module
implements the few calls on our path. The global `torch` is unchanged. With CUDA this module does nothing.
"""

import collections
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

# The modules on the training path that hard-code CUDA devices (Megatron-core 0.16.1).
MODULES = (
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.tensor_parallel.utils",
    "megatron.core.utils",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.models.common.embeddings.rotary_pos_embedding",
)

_FACTORIES = ("zeros", "ones", "empty", "tensor", "full", "empty_like", "arange")


class _Cuda:
    """`torch.cuda` with the host as its one device."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def synchronize(self, *_: object, **__: object) -> None:
        pass


class _Torch:
    """`torch` with "cuda" devices read as the CPU."""

    cuda = _Cuda()

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        value = _on_host(value) if name in _FACTORIES else value
        object.__setattr__(self, name, value)
        return value


def _on_host(factory: Callable) -> Callable:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create


def install() -> None:
    """Install the replacements, once per process; does nothing if CUDA is available."""
    if torch.cuda.is_available():
        return
    _replace_torch([importlib.import_module(name) for name in MODULES])
    _replace_random_states()
    _keep_deepspeed_from_compiling()


def _replace_torch(modules: list[ModuleType]) -> None:
    stand_in = _Torch()
    for module in modules:
        module.torch = stand_in


def _replace_random_states() -> None:
    """Recomputation saves and restores CUDA generator states: use those of the CPU."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")

    class HostStates(random.CudaRNGStatesTracker):
        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    random._CUDA_RNG_STATE_TRACKER = HostStates()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _keep_deepspeed_from_compiling() -> None:
    """If it finds a compiler it builds, for over a minute, a shared-memory all-reduce that only inference uses."""
    importlib.import_module("deepspeed.ops").__compatible_ops__ = collections.defaultdict(bool)
