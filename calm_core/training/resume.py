"""Where a run starts: anew, from the weights of another, or where it stopped."""

from pathlib import Path
from typing import Any

from calm_core.errors import UserError
from calm_core.parallel import checkpoint as checkpoints
from calm_core.parallel.checkpoint_folder import DamagedError, list_checkpoints, open_checkpoint
from calm_core.parallel.engine import Engine
from calm_core.parallel.precision import choose_dtype
from calm_core.parallel.topology import Topology
from calm_core.training.config import TrainingConfig
from calm_core.training.progress import Progress
from calm_core.training.run_folder import RunFolder, check_same_run
from calm_core.training.task import Task


def is_finished(task: Task, config: TrainingConfig, folder: RunFolder, resolved: dict[str, Any]) -> bool:
    """Whether the newest checkpoint of this very run has all steps, and all of its files are whole. Collective.

    Raises:
        UserError: if it is another run's.
    """
    found = list_checkpoints(folder.checkpoints)
    if not found or config.resume == "never":
        return False
    try:
        newest = open_checkpoint(found[-1])
        check_same_run(newest, task.identity, resolved)
        if newest.step < config.steps:
            return False
        checkpoints.verify(newest)
    except DamagedError:
        return False
    return True


def start(
    task: Task, config: TrainingConfig, topology: Topology, folder: RunFolder, resolved: dict[str, Any]
) -> tuple[Engine, Progress]:
    """The engine and the progress to go on from: those of the newest usable checkpoint, if the folder has any.

    Raises:
        UserError: if the folder or `training.init_from` cannot serve this run.
    """
    found = list_checkpoints(folder.checkpoints)
    if found and config.resume == "never":
        raise UserError(f"{folder.path} holds a run already: choose another `run` folder or training.resume=auto.")
    chunks = task.build(topology, choose_dtype(config.precision, topology))
    if config.init_from and not found:
        source = open_checkpoint(Path(config.init_from))
        shared = task.shared_with(source.state["identity"]["model"])
        checkpoints.load_weights(source, chunks, only=shared)
        topology.say(f"starting from {f'{shared}* alone' if shared else 'all weights'} of {source.path}")
    engine = Engine(chunks, config.optimizer, topology)
    return engine, _resume(found, task, engine, resolved) if found else Progress()


def _resume(found: list[Path], task: Task, engine: Engine, resolved: dict[str, Any]) -> Progress:
    for path in reversed(found):
        try:
            newest = open_checkpoint(path)
            notes = check_same_run(newest, task.identity, resolved)
            checkpoints.load(newest, engine)
        except DamagedError as damage:
            engine.topology.say(f"{damage} Trying the one before.")
            continue
        engine.topology.say("\n".join([f"resumed from {path}", *notes]))
        return Progress.restored(newest.state["progress"])
    raise UserError(
        f"{found[0].parent} holds no checkpoint that is whole: restore one, or move the folder away to start anew."
    )
