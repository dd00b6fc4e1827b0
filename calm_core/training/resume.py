"""Where a run starts: anew, from the weights of another, or where it stopped; and how far it has come."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calm_core.checkpoint import load as checkpoints
from calm_core.checkpoint.folder import DamagedError, list_checkpoints, open_checkpoint
from calm_core.config.training_config import TrainingConfig
from calm_core.distributed.engine import Engine
from calm_core.distributed.topology import Topology, choose_dtype
from calm_core.errors import UserError
from calm_core.training.run_folder import RunFolder, check_same_run
from calm_core.training.spikes import Verdict
from calm_core.training.task import Task


@dataclass(frozen=True)
class Progress:
    """All that a resume needs besides weights and moments.

    Attributes:
        step: steps done.
        consumed: samples consumed.
        updates: steps whose update was applied.
        bad_in_a_row: steps with a loss or gradient that was not finite since the last update.
        spikes: steps whose update was left out as a spike.
        spikes_in_a_row: those of them since the last update.
        recent: loss and gradient norm of the last applied updates, as many as spikes are measured by.
    """

    step: int = 0
    consumed: int = 0
    updates: int = 0
    bad_in_a_row: int = 0
    spikes: int = 0
    spikes_in_a_row: int = 0
    recent: tuple[tuple[float, float], ...] = ()

    @classmethod
    def restored(cls, values: dict[str, Any]) -> "Progress":
        """Progress from its fields as JSON gives them back."""
        progress = cls(**values)
        return replace(progress, recent=tuple((loss, norm) for loss, norm in progress.recent))

    def after(self, verdict: Verdict, samples: int, loss: float, norm: float, remembered: int) -> "Progress":
        """Progress after one more step of so many samples; `remembered` updates stay in `recent`."""
        done = replace(self, step=self.step + 1, consumed=self.consumed + samples)
        if verdict == Verdict.NOT_FINITE:
            return replace(done, bad_in_a_row=self.bad_in_a_row + 1)
        if verdict == Verdict.SPIKE:
            return replace(done, spikes=self.spikes + 1, spikes_in_a_row=self.spikes_in_a_row + 1)
        recent = (*self.recent, (loss, norm))[-remembered:] if remembered else ()
        return replace(done, updates=self.updates + 1, bad_in_a_row=0, spikes_in_a_row=0, recent=recent)


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
