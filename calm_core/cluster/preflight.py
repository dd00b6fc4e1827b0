"""The check before a job starts, on each of its nodes: is the configuration sound, is the node?

One process a node under srun: `python -m calm_core.cluster.preflight STAGE --verdicts FOLDER --nodes A,B --tasks N
--address A --port P CONFIG [key=value ...]`. Each writes FOLDER/NODE.json, as far as it has come: a check that hangs is
known by that. What is to be run is part of it, so that the job itself, which runs outside a container, needs neither
torch nor the configuration.
"""

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from calm_core import config as configuration
from calm_core.cluster.layout import describe_layout
from calm_core.data.manifest import write_json
from calm_core.errors import UserError
from calm_core.experiment import Experiment
from calm_core.pipeline.stages import ROOT, Stage, config_path, inputs_of, stages


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
    from calm_core.cluster.health import Limits, meet, problems_of_node

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
