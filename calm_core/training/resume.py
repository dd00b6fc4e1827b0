"""How a run begins: with initial weights, with those of another run, or from a checkpoint of its own; its progress.

Which checkpoint it is, rank 0 decides for all: on a shared file system another node may not see yet, or no more, what
the first one sees, and ranks that decide differently would wait for each other.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from calm_core import config as configuration
from calm_core.checkpoint import load as checkpoints
from calm_core.checkpoint.folder import Checkpoint, DamagedError, list_checkpoints, open_checkpoint, step_of
from calm_core.config.training_config import ScheduleConfig, TrainingConfig
from calm_core.distributed.collectives import on_first_rank
from calm_core.distributed.engine import Engine
from calm_core.distributed.optimizer import UpdateHistory, decay_start, learning_rate_factor
from calm_core.distributed.topology import Topology, choose_dtype
from calm_core.training.checks import RunProgress, check_same_run, check_samples, check_settings, none_undamaged
from calm_core.training.run_log import RunFolder, is_evaluated
from calm_core.training.task import Task


def state_of(
    progress: RunProgress, engine: Engine, resolved: dict[str, Any], identity: dict[str, Any]
) -> dict[str, Any]:
    """The plain values of a checkpoint: all that a resume needs besides tensors."""
    history = engine.optimizer.detector.history
    return {
        "progress": {**asdict(progress), **asdict(history)},
        "updates": history.updates,
        "config": resolved,
        "identity": identity,
    }


def is_finished(
    task: Task, config: TrainingConfig, topology: Topology, folder: RunFolder, resolved: dict[str, Any]
) -> bool:
    """Whether nothing remains to be done, according to the newest checkpoint of this run. Collective.

    Raises:
        UserError: if the checkpoint belongs to another run.
    """
    found = on_first_rank(lambda: list_checkpoints(folder.checkpoints))
    if not found or config.resume == "never":
        return False
    try:
        newest = on_first_rank(lambda: open_checkpoint(found[-1]))
        changes = check_same_run(newest, task, resolved)
        if newest.step < config.steps or not on_first_rank(task.is_finished):
            return False
        if newest.step == config.steps and not on_first_rank(lambda: is_evaluated(folder.metrics, newest.step)):
            return False
        checkpoints.verify(newest)
    except DamagedError:
        return False
    how_many = f"all {config.steps}" if newest.step == config.steps else f"{newest.step}"
    more = f", more than training.steps={config.steps}" if newest.step > config.steps else ""
    topology.say(f"finished: {folder.path} holds {how_many} steps{more}")
    for key, old, new in changes:
        if key.startswith(f"{task.section}.") and key != f"{task.section}.steps":
            topology.say(
                f"not applied, because no steps remain: {key} was {old}, is now {new}; raise {task.section}.steps to "
                "train on, or choose another `run` folder for a new run"
            )
    return True


def start(
    task: Task, config: TrainingConfig, topology: Topology, folder: RunFolder, resolved: dict[str, Any]
) -> tuple[Engine, RunProgress]:
    """The engine and the progress to continue from: those of the newest usable checkpoint, if there is any. Collective.

    Raises:
        UserError: if the folder, `training.resume_from` or `training.init_from` does not fit this run.
    """
    found = on_first_rank(lambda: check_settings(config, topology.layout, topology.world, folder))
    model_parts = task.build(topology, choose_dtype(config.precision, topology))
    if config.init_from and not found:
        source = on_first_rank(lambda: open_checkpoint(Path(config.init_from)))
        shared = task.shared_with(source.state["identity"]["model"])
        checkpoints.load_weights(source, model_parts, only=shared)
        which = " ".join(f"{name}*" for name in shared) + " alone" if all(shared) else "all weights"
        topology.say(f"starting from {which} of {source.path}")
    engine = Engine(model_parts, config.optimizer, topology, config.spikes)
    progress = _resume(found, task, engine, resolved) if found else RunProgress()
    check_samples(task, config, progress)
    return engine, progress


def _resume(found: list[Path], task: Task, engine: Engine, resolved: dict[str, Any]) -> RunProgress:
    for path in reversed(found):
        try:
            newest = on_first_rank(partial(open_checkpoint, path))
            changes = check_same_run(newest, task, resolved)
            checkpoints.load(newest, engine)
        except DamagedError as damage:
            engine.topology.say(f"{damage} Trying the one before.")
            continue
        notes = [f"resume: {key} was {old}, is now {new}" for key, old, new in changes]
        notes += on_first_rank(partial(rate_jump, newest, task.section, resolved))
        engine.topology.say("\n".join([f"resumed from {path}", *notes]))
        values = newest.state["progress"]
        engine.optimizer.detector.history = UpdateHistory.restored(values)
        return RunProgress(values["step"], values["consumed"])
    raise none_undamaged(found)


def rate_jump(checkpoint: Checkpoint, section: str, resolved: dict[str, Any]) -> list[str]:
    """A note if the checkpoint was saved during a decay of the learning rate that the new schedule does not continue.

    Args:
        checkpoint: resumed from.
        section: of the configuration that holds the training settings.
        resolved: the configuration of the resumed run.
    """
    step = checkpoint.step
    (steps, schedule, peak), (new_steps, new_schedule, new_peak) = (
        _schedule(values[section]) for values in (checkpoint.state["config"], resolved)
    )
    start = decay_start(steps, schedule)
    old = peak * learning_rate_factor(step - 1, steps, schedule)
    new = new_peak * learning_rate_factor(step, new_steps, new_schedule)
    if step <= start or new <= 1.01 * old:
        return []
    usable = [path for path in list_checkpoints(checkpoint.path.parent) if step_of(path) <= start]
    advice = (
        f"to decay once, give a new `run` folder and {section}.resume_from={usable[-1]}"
        if usable
        else f"no checkpoint of step {start} or before is left; {section}.milestones=[{start}] would have kept one"
    )
    return [
        f"resume: the learning rate rises from {old:.3g} to {new:.3g}, because {schedule.kind} had begun its decay at "
        f"step {start} of {steps}: {advice}"
    ]


def _schedule(training: dict[str, Any]) -> tuple[int, ScheduleConfig, float]:
    """Steps, schedule and peak learning rate of the training settings of a resolved configuration."""
    schedule = configuration.convert(training["schedule"], ScheduleConfig)
    return training["steps"], schedule, training["optimizer"]["learning_rate"]
