"""The check before a job starts, on each of its nodes: is the configuration sound, is the node fit to train?"""

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
from calm_core.workflow.stages import ROOT, Stage, config_path, inputs_of, stages

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
        probe.write_bytes(PROBE)
        sync(probe)
        if probe.read_bytes() != PROBE:
            return f"{folder} gives back other bytes than were written"
        probe.unlink()
    except OSError as error:
        return f"{folder} is not writable: {error.strerror}"
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def main(arguments: Sequence[str]) -> None:
    """Check, and write the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("--verdicts", type=Path, required=True, help="folder that all nodes share")
    parser.add_argument("--nodes", required=True, help="all nodes, in Slurm's order, with commas")
    parser.add_argument("--tasks", type=int, required=True, help="ranks on each node")
    parser.add_argument("--address", required=True, help="of the first node")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("experiment", nargs="+", help="CONFIG.yaml [key=value ...]")
    parsed = parser.parse_args(arguments)
    path = parsed.verdicts / f"{os.environ['SLURMD_NODENAME']}.json"
    try:
        plan = plan_stage(parsed.stage, parsed.nodes.count(",") + 1, parsed.tasks, *parsed.experiment)
        verdicts = examine(Path(plan["run"]), parsed)
    except UserError as refusal:
        plan, verdicts = None, [{"problems": [str(refusal)], "apart": "", "absent": []}]
    for verdict in verdicts:
        write_json(path, {"plan": plan, **verdict})


def plan_stage(name: str, nodes: int, tasks: int, path: str, *overrides: str) -> dict[str, Any]:
    """What the job has to run and to know, as plain values.

    Raises:
        UserError: if the configuration is wrong, or cannot be trained on `nodes` x `tasks` ranks.
    """
    experiment = configuration.load(Experiment, Path(path), overrides)
    plan = stages(experiment)
    index = next((i for i, stage in enumerate(plan) if stage.name == name), None)
    if index is None:
        raise UserError(f"There is no stage {name!r}: choose one of {', '.join(stage.name for stage in plan)}.")
    stage = plan[index]
    folder, training = {
        "train_autoencoder": (experiment.paths.autoencoder_run, experiment.autoencoder_training),
        "train_calm": (experiment.paths.calm_run, experiment.training),
    }.get(name, (None, None))
    return {
        "run": experiment.run,
        "command": _command(stage, experiment, [path, *overrides]),
        "product": str(stage.product),
        "training": str(folder or ""),
        "steps": training.steps if training else 0,
        "layout": describe_layout(experiment, name, nodes, tasks) if folder else "",
        "inputs": _inputs(experiment, plan),
        "products": [str(earlier.product) for earlier in plan[: index + 1]],
        "config": configuration.to_yaml(experiment),
        "software": _software(),
    }


def _command(stage: Stage, experiment: Experiment, given: list[str]) -> list[str]:
    """The stage's script: one that reads the configuration reads what was given, so that it refuses what it must."""
    arguments = given if stage.arguments == [str(config_path(experiment))] else stage.arguments
    return [str(ROOT / stage.script), *arguments]


def _inputs(experiment: Experiment, plan: list[Stage]) -> str:
    """For the ledger of the pipeline, on the first node: a corpus has many files. '' where the corpus is gone."""
    if os.environ["SLURM_PROCID"] != "0":
        return ""
    try:
        return inputs_of(experiment, plan)
    except UserError:
        return ""


def examine(run: Path, parsed: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is wrong with this node, and with its way to the others; before each part what holds if that never ends."""
    limits = Limits.of(os.environ)
    yield {"problems": ["its check came to no end"], "apart": "", "absent": []}
    problems = problems_of_node(int(os.environ.get("SLURM_GPUS_ON_NODE", "0")), [run], limits)
    yield {"problems": problems, "apart": "it came to no end", "absent": []}
    # All take part, sound or not: the others must not take this node for one that cannot be reached.
    apart, absent = meet(
        int(os.environ["SLURM_PROCID"]), parsed.nodes.split(","), parsed.address, parsed.port, limits.seconds
    )
    yield {"problems": problems, "apart": apart, "absent": absent}


def _software() -> dict[str, str]:
    """Versions of what computes."""
    names = ("torch", "megatron-core", "deepspeed", "numpy", "pyarrow")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


if __name__ == "__main__":
    main(sys.argv[1:])
