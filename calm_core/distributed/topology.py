"""Start-up of the process groups, and this rank's place in them."""

import gc
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from calm_core.config.parallel_config import ParallelConfig
from calm_core.errors import UserError

_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@dataclass(frozen=True)
class Topology:
    """This rank's place in the layout.

    Attributes:
        layout: the configured layout.
        device: where this rank computes.
        rank: of the world.
        world: ranks in all.
        data_rank: which share of every global batch this rank works on.
        data_size: data-parallel size.
        first: whether this rank holds the first pipeline stage.
        last: whether it holds the last one.
    """

    layout: ParallelConfig
    device: torch.device
    rank: int
    world: int
    data_rank: int
    data_size: int
    first: bool
    last: bool

    @property
    def model_parts(self) -> list[tuple[bool, bool, int | None]]:
        """(is the model's first part, is its last, interleaving index) of each model part of this rank."""
        count = self.layout.virtual
        if count == 1:
            return [(self.first, self.last, None)]
        return [(self.first and i == 0, self.last and i == count - 1, i) for i in range(count)]

    def say(self, text: str) -> None:
        """Print a line for the person at the terminal, once and not on every rank."""
        if self.rank == 0:
            print(text, flush=True)


@contextmanager
def distributed(layout: ParallelConfig) -> Iterator[Topology]:
    """Join the process groups of a run, under torchrun or as a single process, and leave them at the end.

    Where the process has initialised torch.distributed already, that group is the world, and stays.

    Raises:
        UserError: if the layout does not divide the world, or this rank has no GPU where others have one.
    """
    device = _device()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    layout.data_parallel(world)
    # Tensor-parallel overlap relies on the order in which a single connection takes kernels.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # spares DeepSpeed a search, and us its warning
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from calm_core.distributed import cpu_shim as stand_ins

    stand_ins.install()
    with _process_group(device, timedelta(minutes=layout.timeout_minutes)):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        )
        # The layers fork this random state; nothing draws from it, for all noise has streams of its own.
        model_parallel_cuda_manual_seed(0)
        try:
            yield Topology(
                layout=layout,
                device=device,
                rank=dist.get_rank(),
                world=world,
                data_rank=parallel_state.get_data_parallel_rank(),
                data_size=parallel_state.get_data_parallel_world_size(),
                first=parallel_state.is_pipeline_first_stage(),
                last=parallel_state.is_pipeline_last_stage(),
            )
        finally:
            _leave_groups()


def _leave_groups() -> None:
    """Destroy the groups of the layout, which Megatron-core only forgets, and the models that refer to them in cycles.

    Each gloo group has threads that poll: those of a process that walks from layout to layout would slow the machine.
    """
    from megatron.core import parallel_state

    groups = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()
    for group in groups:
        if group in dist.distributed_c10d._world.pg_map:  # not the world, which the list has as None
            dist.destroy_process_group(group)
    gc.collect()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= found:
        raise UserError(
            f"this machine has {found} GPUs for more ranks than that (local rank {local}): start one rank per GPU, "
            f"--nproc-per-node {found}."
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


@contextmanager
def _process_group(device: torch.device, timeout: timedelta) -> Iterator[None]:
    if dist.is_initialized():
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    alone = "RANK" not in os.environ
    if alone:  # a plain `python` run is a world of one; DeepSpeed reads these variables besides
        os.environ.update(_ALONE)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()
        if alone:
            for name in _ALONE:
                del os.environ[name]


def choose_dtype(precision: str, topology: Topology) -> torch.dtype:
    """The dtype that `precision` names. Collective.

    With `auto` rank 0 chooses, by `local_dtype`.
    """
    if precision == "auto" and topology.device.type != "cuda":
        chosen = [local_dtype(precision, topology.device)]
        dist.broadcast_object_list(chosen, src=0)
        return chosen[0]
    return local_dtype(precision, topology.device)


def local_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that `precision` names, for this process alone.

    `auto` is bf16 on a GPU, and on a CPU bf16 only where its matrix products are the faster ones: processors with
    bf16 instructions gain several times, others emulate them and lose far more.
    """
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    if device.type == "cuda":
        return torch.bfloat16
    faster = _product_seconds(torch.bfloat16) < _product_seconds(torch.float32)
    return torch.bfloat16 if faster else torch.float32


def _product_seconds(dtype: torch.dtype, size: int = 256, repeats: int = 3) -> float:
    a = torch.ones(size, size, dtype=dtype)
    a @ a
    start = time.perf_counter()
    for _ in range(repeats):
        a @ a
    return time.perf_counter() - start
