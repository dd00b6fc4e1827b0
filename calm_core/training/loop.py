"""The training loop: batches in, updates out, with metrics, evaluation and checkpoints along the way."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from calm_core import config as configuration
from calm_core.checkpoint.save import Saver
from calm_core.config.training_config import TrainingConfig
from calm_core.distributed.collectives import average_metrics, on_first_rank
from calm_core.distributed.engine import Engine, Pass
from calm_core.distributed.optimizer import learning_rate_factor
from calm_core.distributed.topology import Topology
from calm_core.errors import ExitCode, UserError
from calm_core.training.hardware import deterministic
from calm_core.training.loader import Loader, step_samples
from calm_core.training.profiler import StepProfiler
from calm_core.training.reporter import Reporter
from calm_core.training.resume import Progress, is_finished, start
from calm_core.training.run_folder import RunFolder
from calm_core.training.signals import Requests
from calm_core.training.spikes import Verdict, judge
from calm_core.training.task import Task
from calm_core.training.watchdog import Watchdog


def train(
    task: Task,
    config: TrainingConfig,
    topology: Topology,
    folder: RunFolder,
    experiment: Any,
    at_end: Callable[[Engine], None] | None = None,
    product: Path | None = None,
) -> ExitCode:
    """Train `task` to `config.steps`, resuming where the run folder says.

    Args:
        task: model, data and evaluation.
        config: how to train it.
        topology: the layout.
        folder: where the run lives.
        experiment: the whole resolved configuration, saved with the run and in each checkpoint.
        at_end: called with the trained engine after the last step; collective.
        product: the last file that `at_end` writes; a run is finished when it and the last checkpoint are there.

    Returns:
        OK, or STOPPED if a signal or a file asked for it (a checkpoint is saved).

    Raises:
        UserError: if the folder or a checkpoint cannot serve this run, or its loss stays non-finite or
            keeps jumping.
    """
    accumulated = config.micro_batches(topology.data_size, topology.layout.micro_batch_multiple)
    resolved = configuration.to_dict(experiment)
    _check_hang_time(config, topology)
    with ExitStack() as held:
        held.enter_context(deterministic(config.deterministic))
        watchdog = Watchdog(config.hang_start_minutes, config.hang_minutes, topology.rank, folder.logs)
        held.enter_context(watchdog)
        on_first_rank(lambda: held.enter_context(folder.locked()))
        if is_finished(task, config, folder, resolved) and (product is None or product.exists()):
            topology.say(f"finished: {folder.path} holds all {config.steps} steps")
            return ExitCode.OK
        engine, progress = start(task, config, topology, folder, resolved)
        held.callback(engine.close)
        on_first_rank(lambda: configuration.save(experiment, folder.config))
        reporter = held.enter_context(Reporter(task, config, topology, folder, progress, engine.dtype, resolved))
        requests = held.enter_context(Requests(folder.path))
        saver = held.enter_context(Saver(folder.checkpoints, engine, config.keep))

        def state() -> dict[str, Any]:
            return {
                "progress": asdict(progress),
                "updates": progress.updates,
                "config": resolved,
                "identity": task.identity,
            }

        def plan(consumed: int) -> list[Any]:
            return step_samples(consumed, accumulated, config.micro_batch, topology.data_rank, topology.data_size)

        remaining = config.steps - progress.step
        loader = held.enter_context(Loader(task.load, plan, progress.consumed, config.global_batch, remaining))
        profiler = StepProfiler(experiment.profile, folder.path / "profile", topology, progress.step)
        held.enter_context(profiler)
        while progress.step < config.steps:
            batches = reporter.waited(loader.next)
            profiler.begin(progress.step + 1)
            progress = _train_step(task, config, engine, batches, progress, reporter)
            profiler.end(progress.step)
            watchdog.alive(f"step {progress.step}")
            last, milestone = progress.step == config.steps, progress.step in config.milestones
            if last or milestone or _due(progress.step, config.eval_every):
                reporter.evaluation(progress.step, task.evaluate(engine), task.texts(engine))
                watchdog.alive(f"the evaluation after step {progress.step}")
            reporter.saving(progress.step, saver.poll)
            asked = requests.agreed(topology.device)
            now = last or asked.save or asked.stop
            if now or milestone or _due(progress.step, config.save_every):
                reporter.saving(progress.step, saver.wait)
                reporter.saving(progress.step, partial(saver.save, progress.step, state()))
                if now or not config.background_saves:
                    reporter.saving(progress.step, saver.wait)
                requests.obeyed(asked)
                watchdog.alive(f"the checkpoint of step {progress.step}")
            if asked.stop and not last:
                reporter.ended("stopped")
                return ExitCode.STOPPED
        if at_end is not None:
            at_end(engine)
        reporter.ended("finished")
    return ExitCode.OK


def _train_step(
    task: Task, config: TrainingConfig, engine: Engine, batches: list[Any], progress: Progress, reporter: Reporter
) -> Progress:
    """One step: gradients of the global batch, one update if loss and gradient allow it, one record."""
    shape = Pass(config.positions, config.micro_batch)
    results = engine.forward_backward(task.forward_step, batches, shape)
    metrics = average_metrics(results, engine.topology)
    factor = learning_rate_factor(progress.step, config.steps, config.schedule)
    learning_rate = factor * config.optimizer.learning_rate
    loss, recent, spikes = metrics["loss"], progress.recent, config.spikes
    update = engine.step(learning_rate, admit=lambda norm: judge(loss, norm, recent, spikes))
    progress = progress.after(
        Verdict(update.answer), config.global_batch, loss, update.gradient_norm, spikes.remembered
    )
    reporter.step(progress, metrics, update, learning_rate)
    _give_up(progress, config)
    return progress


def _give_up(progress: Progress, config: TrainingConfig) -> None:
    """End a run whose updates have been refused too often in a row.

    Raises:
        UserError: in that case.
    """
    spikes = 1 if config.spikes.action == "stop" else config.spikes.in_a_row
    if progress.bad_in_a_row >= config.bad_steps:
        reason = f"the loss or its gradient was not finite for {config.bad_steps} steps running (training.bad_steps)"
    elif progress.spikes_in_a_row >= spikes:
        reason = f"the loss or its gradient was a spike for {spikes} steps running (training.spikes)"
    else:
        return
    raise UserError(
        f"training stopped at step {progress.step}: {reason}; weights are those of the last good step, and "
        "metrics.jsonl names the documents of the refused ones; try a lower learning rate."
    )


def _check_hang_time(config: TrainingConfig, topology: Topology) -> None:
    """The watchdog must come before the end of a collective's patience: that one leaves no stacks.

    Raises:
        UserError: if it does not.
    """
    patience = topology.layout.timeout_minutes
    if config.hang_minutes >= patience:
        raise UserError(
            f"training.hang_minutes={config.hang_minutes:g} is not below parallel.timeout_minutes={patience:g}, which "
            "would end the run first and say less: lower the one or raise the other."
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
