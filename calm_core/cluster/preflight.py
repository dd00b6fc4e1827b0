"""The check before a job starts, on each of its nodes: is the configuration valid, and can the node train?"""

import argparse
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from calm_core import config as configuration
from calm_core.cluster.launcher import describe_layout
from calm_core.config.experiment import Experiment
from calm_core.errors import UserError
from calm_core.io import sync, write_json
from calm_core.workflow.stages import ROOT, Stage, config_path, find_stage, inputs_of, stages

GIB = 2**30

FREE_FRACTION = 0.9  # of a GPU's memory: another process, perhaps of an earlier job, holds what is missing

PROBE = b"calm" * 2**18  # 1 MiB


@dataclass(frozen=True)
class Requirements:
    """What a node must have, as `launchers/site.env` says; `seconds` is how long to wait for the slowest node."""

    scratch: Path
    scratch_gib: float
    memory_gib: float
    seconds: float

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Requirements":
        """The requirements that variables set, or the defaults."""
        return cls(
            scratch=Path(os.path.expandvars(environment.get("CALM_SCRATCH") or "/tmp")),
            scratch_gib=float(environment.get("CALM_SCRATCH_GIB") or 1),
            memory_gib=float(environment.get("CALM_MEMORY_GIB") or 1),
            seconds=float(environment.get("CALM_CHECK_SECONDS") or 120),
        )


def problems_of_node(promised: int, folders: Iterable[Path], required: Requirements) -> list[str]:
    """Every fault of this node, one phrase each; `promised` is the number of GPUs that Slurm gave it."""
    free = psutil.virtual_memory().available / GIB
    few = [] if free >= required.memory_gib else [f"{free:.1f} GiB of memory free, {required.memory_gib:g} needed"]
    disks = [problem for folder in (required.scratch, *folders) if (problem := _unwritable(folder))]
    if not disks and (room := psutil.disk_usage(str(required.scratch)).free / GIB) < required.scratch_gib:
        disks.append(f"{room:.1f} GiB free below {required.scratch}, {required.scratch_gib:g} needed")
    return [*_device_problems(promised), *few, *disks]


def all_reduce(rank: int, nodes: list[str], address: str, port: int, seconds: float) -> tuple[str, list[str]]:
    """All-reduce among one process of each node, over the network that training uses.

    Returns:
        The error, or ''; and after an error, on the first node, the nodes that never connected.
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
        if store is None or rank > 0:
            return _first_line(error), []
        return _first_line(error), [node for node in nodes if not store.check([f"here/{node}"])]
    return "", []


def _device_problems(promised: int) -> list[str]:
    if promised == 0:  # the GPUs that are visible all the same belong to other jobs
        return []
    seen = torch.cuda.device_count()
    if seen != promised:
        return [f"Slurm gives {promised} GPUs, torch sees {seen}"]
    return [problem for index in range(seen) if (problem := _device_problem(index))]


def _device_problem(index: int) -> str:
    try:
        free, total = torch.cuda.mem_get_info(index)
        if free < FREE_FRACTION * total:
            return f"GPU {index} has {free / GIB:.0f} of {total / GIB:.0f} GiB free: another process holds the rest"
        ones = torch.ones(1024, 1024, device=f"cuda:{index}", dtype=torch.bfloat16)
        if not bool(torch.all(ones @ ones == 1024)):
            return f"GPU {index} computes a wrong matrix product"
    except RuntimeError as error:
        return f"GPU {index}: {_first_line(error)}"
    return ""


def _unwritable(folder: Path) -> str:
    probe = folder / f".probe-{os.environ.get('SLURMD_NODENAME', '')}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(PROBE)
        sync(probe)
        if probe.read_bytes() != PROBE:
            return f"{folder} returns other bytes than were written"
        probe.unlink()
    except OSError as error:
        return f"{folder} is not writable: {error.strerror}"
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def main(arguments: Sequence[str]) -> None:
    """Check, and write a report: at each point the one that holds if the check never gets further."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("--reports", type=Path, required=True, help="folder that all nodes share")
    parser.add_argument("--nodes", required=True, help="all nodes, in Slurm's order, separated by commas")
    parser.add_argument("--tasks", type=int, required=True, help="ranks on each node")
    parser.add_argument("--address", required=True, help="of the first node")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("experiment", nargs="+", help="CONFIG.yaml [key=value ...]")
    parsed = parser.parse_args(arguments)
    path = parsed.reports / f"{os.environ['SLURMD_NODENAME']}.json"
    try:
        plan = plan_stage(parsed.stage, parsed.nodes.count(",") + 1, parsed.tasks, *parsed.experiment)
    except UserError as error:
        write_json(path, {"plan": None, "problems": [str(error)], "network_error": "", "unreached": []})
        return
    for report in check_node(Path(plan["run"]), parsed):
        write_json(path, {"plan": plan, **report})


def plan_stage(name: str, nodes: int, tasks: int, path: str, *overrides: str) -> dict[str, Any]:
    """What the job has to run and to know, as plain values.

    Raises:
        UserError: if the configuration is wrong, or cannot be trained on `nodes` x `tasks` ranks.
    """
    experiment = configuration.load(Experiment, Path(path), overrides)
    plan, stage = stages(experiment), find_stage(experiment, name)
    training = stage.training
    return {
        "run": experiment.run,
        "command": _command(stage, experiment, [path, *overrides]),
        "environment": stage.environment,
        "shareable": stage.shareable,
        "product": str(stage.product),
        "training": str(training.folder) if training else "",
        "steps": training.config.steps if training else 0,
        "layout": describe_layout(training, nodes, tasks) if training else "",
        "inputs": _inputs(experiment, plan),
        "products": [str(earlier.product) for earlier in plan[: plan.index(stage) + 1]],
        "config": configuration.to_yaml(experiment),
        "software": _software(),
    }


def _command(stage: Stage, experiment: Experiment, given: list[str]) -> list[str]:
    """The stage's script, with the configuration as it was given where the stage reads one: it refuses what it must."""
    arguments = given if stage.arguments == [str(config_path(experiment))] else stage.arguments
    return [str(ROOT / stage.script), *arguments]


def _inputs(experiment: Experiment, plan: list[Stage]) -> str:
    """For the workflow's ledger. Only the first node computes it, as a corpus has many files; '' without a corpus."""
    if os.environ["SLURM_PROCID"] != "0":
        return ""
    try:
        return inputs_of(experiment, plan)
    except UserError:
        return ""


def check_node(run: Path, parsed: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The faults of this node and of its connection to the others, in reports that each replace the one before."""
    required = Requirements.of(os.environ)
    yield {"problems": ["its check did not end"], "network_error": "", "unreached": []}
    problems = problems_of_node(int(os.environ.get("SLURM_GPUS_ON_NODE", "0")), [run], required)
    yield {"problems": problems, "network_error": "the all-reduce did not end", "unreached": []}
    # Faulty nodes take part too: the others must not report them as unreached.
    rank, nodes = int(os.environ["SLURM_PROCID"]), parsed.nodes.split(",")
    error, unreached = all_reduce(rank, nodes, parsed.address, parsed.port, required.seconds)
    yield {"problems": problems, "network_error": error, "unreached": unreached}


def _software() -> dict[str, str]:
    """Versions of the packages that compute."""
    names = ("torch", "megatron-core", "deepspeed", "numpy", "pyarrow")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


if __name__ == "__main__":
    main(sys.argv[1:])
