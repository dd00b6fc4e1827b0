"""Whether a node is fit to train: devices, memory, disks, and the way to the other nodes."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

GIB = 2**30
FREE_SHARE = 0.9  # of a GPU's memory: what is missing is held by another process, perhaps of a job long gone
PROBE = b"calm" * 2**18  # 1 MiB


@dataclass(frozen=True)
class Limits:
    """What a node must have, as `launchers/site.env` says."""

    scratch: Path
    scratch_gib: float
    memory_gib: float
    seconds: float

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Limits":
        """The limits that variables set, or the defaults."""
        return cls(
            scratch=Path(os.path.expandvars(environment.get("CALM_SCRATCH") or "/tmp")),
            scratch_gib=float(environment.get("CALM_SCRATCH_GIB") or 1),
            memory_gib=float(environment.get("CALM_MEMORY_GIB") or 1),
            seconds=float(environment.get("CALM_CHECK_SECONDS") or 120),
        )


def problems_of_node(promised: int, folders: Iterable[Path], limits: Limits) -> list[str]:
    """Everything wrong with this node by itself, one phrase each; `promised` is the number of GPUs Slurm gave it."""
    free = psutil.virtual_memory().available / GIB
    few = [] if free >= limits.memory_gib else [f"{free:.1f} GiB of memory free, {limits.memory_gib:g} needed"]
    disks = [problem for folder in (limits.scratch, *folders) if (problem := _unwritable(folder))]
    if not disks and (room := psutil.disk_usage(str(limits.scratch)).free / GIB) < limits.scratch_gib:
        disks.append(f"{room:.1f} GiB free below {limits.scratch}, {limits.scratch_gib:g} needed")
    return [*_device_problems(promised), *few, *disks]


def meet(rank: int, nodes: list[str], address: str, port: int, seconds: float) -> tuple[str, list[str]]:
    """All-reduce among the first ranks of all nodes, by the network that training uses.

    Returns:
        What went wrong, or ''; and on the first node those that never came, if so.
    """
    wait, cuda, store = timedelta(seconds=seconds), torch.cuda.is_available(), None
    try:
        store = dist.TCPStore(address, port, is_master=rank == 0, wait_for_workers=False, timeout=wait)
        store.set(f"here/{nodes[rank]}", "")
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=len(nodes), timeout=wait)
        total = torch.ones(1, device="cuda" if cuda else "cpu")
        dist.all_reduce(total)
        if total.item() != len(nodes):
            return f"the sum over {len(nodes)} nodes came out as {total.item():g}", []
        dist.barrier()
        dist.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        came = store is not None and rank == 0
        return _first_line(error), [node for node in nodes if not store.check([f"here/{node}"])] if came else []
    return "", []


def _device_problems(promised: int) -> list[str]:
    seen = torch.cuda.device_count()
    if seen != promised:
        return [f"Slurm gives {promised} GPUs, torch sees {seen}"]
    return [problem for index in range(seen) if (problem := _device_problem(index))]


def _device_problem(index: int) -> str:
    try:
        free, total = torch.cuda.mem_get_info(index)
        if free < FREE_SHARE * total:
            return f"GPU {index} has {free / GIB:.0f} of {total / GIB:.0f} GiB free: another process holds the rest"
        ones = torch.ones(1024, 1024, device=f"cuda:{index}", dtype=torch.bfloat16)
        if not bool(torch.all(ones @ ones == 1024)):
            return f"GPU {index} multiplies wrongly"
    except RuntimeError as error:
        return f"GPU {index}: {_first_line(error)}"
    return ""


def _unwritable(folder: Path) -> str:
    probe = folder / f".probe-{os.environ.get('SLURMD_NODENAME', '')}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(probe, "wb") as file:
            file.write(PROBE)
            file.flush()
            os.fsync(file.fileno())
        if probe.read_bytes() != PROBE:
            return f"{folder} gives back other bytes than were written"
        probe.unlink()
    except OSError as error:
        return f"{folder} is not writable: {error.strerror}"
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
