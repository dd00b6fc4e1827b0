"""What a training refuses before its first step, without any process group: `--dry-run` makes the same checks."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calm_core import config as configuration
from calm_core.checkpoint.folder import Checkpoint, DamagedError, list_checkpoints, open_checkpoint
from calm_core.config.experiment import Experiment
from calm_core.config.training_config import ParallelConfig, TrainingConfig
from calm_core.errors import UserError
from calm_core.training.run_log import RunFolder

if TYPE_CHECKING:  # importing it imports Megatron-core, which takes seconds that a plan without data does not need
    from calm_core.training.task import Task


@dataclass(frozen=True)
class RunProgress:
    """Steps done and samples consumed."""

    step: int = 0
    consumed: int = 0

    def after(self, samples: int) -> "RunProgress":
        """The progress after one more step of this many samples."""
        return RunProgress(self.step + 1, self.consumed + samples)


def resolved(experiment: Experiment) -> dict[str, Any]:
    """The whole configuration as a run and its checkpoints have it: plain values, paths absolute."""
    return configuration.to_dict(configuration.with_absolute_paths(experiment))


def check_settings(config: TrainingConfig, layout: ParallelConfig, world: int, folder: RunFolder) -> list[Path]:
    """Refuse what cannot work with any data, before anything is written.

    Returns:
        The checkpoints that the run may resume from, oldest first.

    Raises:
        UserError: naming the key or the folder.
    """
    config.micro_batches(layout.data_parallel(world), layout.micro_batch_multiple)
    if config.hang_minutes >= layout.timeout_minutes:  # a collective that times out ends the run without stacks
        raise UserError(
            f"training.hang_minutes={config.hang_minutes:g} is not below parallel.timeout_minutes="
            f"{layout.timeout_minutes:g}, which would end the run first, without stacks: lower the first or raise the "
            "second."
        )
    folder.require_run()
    found = list_checkpoints(folder.checkpoints)
    if found and config.resume == "never":
        raise UserError(f"{folder.path} already holds a run: choose another `run` folder or training.resume=auto.")
    for source in (config.resume_from, config.init_from):
        if source and not found:
            open_checkpoint(Path(source))
    return found or [Path(config.resume_from)] * bool(config.resume_from)


def check_start(
    task: "Task",
    config: TrainingConfig,
    layout: ParallelConfig,
    world: int,
    folder: RunFolder,
    settings: dict[str, Any],
) -> None:
    """Refuse a run that cannot start, before anything is written or a model is built.

    Args:
        task: model, data and evaluation.
        config: how to train it.
        layout: over ranks.
        world: number of ranks.
        folder: of the run.
        settings: the whole configuration, as `resolved` gives it.

    Raises:
        UserError: if the settings cannot work, the data is too small, or the run's folder or the checkpoint that it
            starts from is another model's.
    """
    found = check_settings(config, layout, world, folder)
    task.check(layout, world)
    progress = _progress(found, task, settings) if found else RunProgress()
    if config.init_from and not found:
        task.shared_with(open_checkpoint(Path(config.init_from)).state["identity"]["model"])
    check_samples(task, config, progress)


def _progress(found: list[Path], task: "Task", settings: dict[str, Any]) -> RunProgress:
    """That of the newest checkpoint whose manifest is undamaged; its tensors are not read."""
    for path in reversed(found):
        try:
            newest = open_checkpoint(path)
        except DamagedError:
            continue
        check_same_run(newest, task, settings)
        values = newest.state["progress"]
        return RunProgress(values["step"], values["consumed"])
    raise none_undamaged(found)


def none_undamaged(found: list[Path]) -> UserError:
    """The error of a run none of whose checkpoints can be used."""
    return UserError(
        f"{found[0].parent} holds no undamaged checkpoint: restore one, or move the folder away to start over."
    )


def check_samples(task: "Task", config: TrainingConfig, progress: RunProgress) -> None:
    """Refuse a run whose remaining steps need more samples than the stores have.

    Raises:
        UserError: saying how many they have.
    """
    remaining = config.steps - progress.step
    if remaining > 0:
        task.require(progress.consumed + remaining * config.global_batch)


def check_same_run(checkpoint: Checkpoint, task: "Task", settings: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Compare a run about to resume with the checkpoint it resumes from.

    Returns:
        (key, old value, new value) of each setting that has changed and may change.

    Raises:
        UserError: if the model's shape, the data or the seed differ: then it is another run.
    """
    saved, own = checkpoint.state["identity"], task.identity
    shape = configuration.changes(task.shape_type, saved["model"], own["model"])
    others = configuration.differences({**saved, "model": None}, {**own, "model": None})
    if changed := [*((f"model.{key}", old, new) for key, old, new in shape), *others]:
        key, old, new = changed[0]
        raise UserError(
            f"{checkpoint.path} belongs to another run: {key} was {old} and is now {new}; restore it, choose another "
            "`run` folder, or start from these weights by training.init_from."
        )
    return configuration.changes(Experiment, checkpoint.state["config"], settings)
