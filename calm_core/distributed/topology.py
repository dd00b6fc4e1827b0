"""Start-up of the process groups, and the position of this rank in them."""

import ctypes
import gc
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from calm_core.config.training_config import ParallelConfig
from calm_core.errors import UserError

PR_SET_PDEATHSIG = 1  # of prctl(2)

LAUNCHER = "CALM_TORCHRUN_PID"  # set by our torchrun: its process id

_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@dataclass(frozen=True)
class Topology:
    """The position of this rank in the layout.

    Attributes:
        layout: the configured layout.
        device: where this rank computes.
        rank: index in the world.
        world: number of ranks.
        data_rank: index among the data-parallel ranks.
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
        """Print a line on rank 0."""
        if self.rank == 0:
            print(text, flush=True)


@contextmanager
def distributed(layout: ParallelConfig) -> Iterator[Topology]:
    """Join the process groups of a run, under torchrun or as a single process, and leave them at the end.

    If the process has already initialised torch.distributed, that group is the world and remains.

    Raises:
        UserError: if the layout does not divide the world, the environment describes no world, or this rank has no GPU
            where others have one.
    """
    # Read when CUDA starts: tensor-parallel overlap relies on a single connection that keeps the order of kernels.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Without this DeepSpeed searches for an accelerator and warns.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    layout.data_parallel(world)
    _check_environment()
    end_with_launcher()
    device = _device()
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    from calm_core.distributed import cpu_shim
    from calm_core.megatron import model_parallel_cuda_manual_seed, parallel_state

    cpu_shim.install()
    with _process_group(device, timedelta(minutes=layout.timeout_minutes)):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
            distributed_timeout_minutes=layout.timeout_minutes,
            create_gloo_process_groups=False,
        )
        # The layers fork this random state; nothing draws from it, since all noise has its own streams.
        model_parallel_cuda_manual_seed(0)
        with _leaving(_leave_groups):
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


def _check_environment() -> None:
    """Refuse an environment that names a world without saying how to join it."""
    if dist.is_initialized() or _is_alone():
        return
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        known = ", ".join(f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE") if name in os.environ)
        raise UserError(
            f"the environment has {known} but no {', '.join(missing)}: start the ranks with torchrun, which sets them "
            "all, or unset RANK and WORLD_SIZE to run a single process."
        )


def _is_alone() -> bool:
    """Whether the environment describes a single process: a plain `python`, or rank 0 of 1 with no address to join."""
    rank, world, address = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return world in (None, "1") and rank in (None, "0") and (rank is None or not address)


def end_with_launcher() -> None:
    """Have Linux send SIGTERM to this process when torchrun dies: a training saves a checkpoint then, and ends."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid()):  # it died before the call
        raise UserError("torchrun has ended, so this rank ends too: start it again.")


@contextmanager
def _leaving(leave: Callable[[], None]) -> Iterator[None]:
    """Call `leave` at the end of the block, unless the block fails in a world of several ranks.

    Destroying a NCCL group waits for ranks that wait in a collective for this one: the rank that failed would hang
    before its error is printed. It ends the process instead (see `config.command.guard`).
    """
    try:
        yield
    except BaseException:
        if dist.get_world_size() == 1:
            leave()
        raise
    leave()


def _leave_groups() -> None:
    """Destroy the groups of the layout, which Megatron-core does not, and the models that refer to them in cycles.

    Each gloo group has polling threads: those of earlier layouts would slow down a process that uses several in turn.
    """
    from calm_core.megatron import parallel_state

    groups = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()
    for group in groups:
        if group in dist.distributed_c10d._world.pg_map:  # not the world, which the list contains as None
            dist.destroy_process_group(group)
    gc.collect()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= found:
        raise UserError(
            f"this machine has {found} GPUs and more ranks than that (local rank {local}): start one rank per GPU, "
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
    added = [name for name in _ALONE if name not in os.environ] if _is_alone() else []
    if _is_alone():
        os.environ.update({name: _ALONE[name] for name in added})  # DeepSpeed reads these variables
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    with _leaving(dist.destroy_process_group):
        try:
            yield
        finally:
            for name in added:
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

    `auto` is bf16 on a GPU, and on a CPU the dtype with the faster matrix products: processors with bf16 instructions
    are several times faster in bf16, others emulate it and are far slower.
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
