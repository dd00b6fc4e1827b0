"""The training loop: batches in, updates out, with metrics, checkpoints and evaluations along the way."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from calm_core import config as configuration
from calm_core.checkpoint.save import SavePolicy, Saver
from calm_core.config.training_config import TrainingConfig
from calm_core.distributed.collectives import average_metrics, on_first_rank
from calm_core.distributed.engine import Engine, Pass
from calm_core.distributed.optimizer import learning_rate_factor
from calm_core.distributed.topology import Topology
from calm_core.errors import ExitCode, UserError
from calm_core.training.batch_loader import Loader, step_samples
from calm_core.training.hardware import StepProfiler, deterministic, explain_out_of_memory
from calm_core.training.reporter import Reporter
from calm_core.training.resume import RunProgress, check_samples, is_finished, start, state_of
from calm_core.training.run_log import RunFolder, is_evaluated
from calm_core.training.stopping import Requests, Watchdog
from calm_core.training.task import Task


def train(
    task: Task,
    config: TrainingConfig,
    topology: Topology,
    folder: RunFolder,
    experiment: Any,
    write_page: Callable[[Path], object] | None = None,
) -> ExitCode:
    """Train `task` to `config.steps`, resuming from the newest checkpoint in the run folder.

    Args:
        task: model, data and evaluation.
        config: how to train it.
        topology: the layout.
        folder: of the run.
        experiment: the whole resolved configuration, saved with the run and in each checkpoint.
        write_page: brings the page of the experiment in this folder up to date.

    Returns:
        OK, or STOPPED if a signal or a file asked for it; then a checkpoint is saved.

    Raises:
        UserError: if the folder or a checkpoint does not fit this run, or its loss remains not finite or a spike.
    """
    resolved = configuration.to_dict(configuration.with_absolute_paths(experiment))
    check(task, config, topology, folder)
    watchdog = Watchdog(config.hang_start_minutes, config.hang_minutes, topology.rank, folder.logs)
    out_of_memory = explain_out_of_memory(task.section)
    with deterministic(config.deterministic), out_of_memory, watchdog, ExitStack() as stack:
        on_first_rank(lambda: stack.enter_context(folder.locked()))
        if is_finished(task, config, topology, folder, resolved):
            return ExitCode.OK
        engine, progress = start(task, config, topology, folder, resolved)
        stack.callback(engine.close)
        on_first_rank(lambda: configuration.save(experiment, folder.config))
        reporter = stack.enter_context(Reporter(task, config, folder, engine, progress, resolved, write_page))
        requests = stack.enter_context(Requests(folder.path))
        saver = stack.enter_context(Saver(folder.checkpoints, engine, save_policy(config)))
        save = partial(save_step, saver, reporter, watchdog)
        evaluate = partial(evaluate_step, task, config, engine, folder, reporter, requests, watchdog)
        loader = stack.enter_context(open_loader(task, config, topology, progress))
        profiler = stack.enter_context(
            StepProfiler(experiment.profile, folder.path / "profile", topology, progress.step)
        )

        evaluated = evaluate(progress.step)  # if the process before this one saved the step but did not evaluate it
        while evaluated and progress.step < config.steps:
            profiler.begin(progress.step + 1)
            progress = train_step(task, config, engine, loader, progress, reporter)
            profiler.end(progress.step)
            watchdog.alive(f"step {progress.step}")

            state = partial(state_of, progress, engine, resolved, task.identity)
            save(
                progress.step,
                state,
                now=progress.step == config.steps,
                wait=is_evaluation_due(config, progress.step),
            )
            evaluated = evaluate(progress.step)
            asked = requests.agreed(topology.device)
            if asked.save or asked.stop:
                save(progress.step, state, now=True, wait=True)
                requests.met(asked)
            if asked.stop:
                break
        if progress.step < config.steps or not evaluated:
            reporter.ended("stopped")
            topology.say(f"stopped on request after step {progress.step}: a checkpoint is saved, run again to go on")
            return ExitCode.STOPPED
        task.finish(engine)
        reporter.ended("finished")
    return ExitCode.OK


def train_step(
    task: Task, config: TrainingConfig, engine: Engine, loader: Loader, progress: RunProgress, reporter: Reporter
) -> RunProgress:
    """One step: gradients of the global batch, one update unless it is skipped, one record."""
    batches, waited = loader.next()
    task.begin(progress.step / config.steps)
    results = engine.forward_backward(task.forward_step, batches, Pass(config.positions, config.micro_batch))
    metrics = average_metrics(results, engine.topology)
    factor = learning_rate_factor(progress.step, config.steps, config.schedule)
    learning_rate = factor * config.optimizer.learning_rate
    update = engine.step(learning_rate, metrics["loss"])
    progress = progress.after(config.global_batch)
    reporter.step(progress, metrics, update, learning_rate, waited)
    check_skipped(progress, engine, config)
    return progress


def save_step(
    saver: Saver,
    reporter: Reporter,
    watchdog: Watchdog,
    step: int,
    state: Callable[[], dict[str, Any]],
    *,
    now: bool,
    wait: bool,
) -> None:
    """Save this step if it is due, or in any case `now`; complete what is written, or `wait` for it to be complete."""
    with reporter.paused():
        saved = saver.after_step(step, state, now, wait)
        reporter.saved(step, saved)
    if saved:
        watchdog.alive(f"the checkpoint of step {saved[-1].step}")


def evaluate_step(
    task: Task,
    config: TrainingConfig,
    engine: Engine,
    folder: RunFolder,
    reporter: Reporter,
    requests: Requests,
    watchdog: Watchdog,
    step: int,
) -> bool:
    """Evaluate this step if it is due and not yet evaluated; False if a request to stop ended the evaluation early."""
    if not is_evaluation_due(config, step) or on_first_rank(lambda: is_evaluated(folder.metrics, step)):
        return True
    with reporter.paused():
        metrics = task.evaluate(engine, lambda: requests.agreed(engine.topology.device).stop)
        if metrics is None:
            return False
        reporter.evaluation(step, metrics, task.texts(engine))
    watchdog.alive(f"the evaluation after step {step}")
    return True


def is_evaluation_due(config: TrainingConfig, step: int) -> bool:
    """Whether the model is evaluated after this step."""
    regular = step > 0 and config.eval_every > 0 and step % config.eval_every == 0
    return regular or step in config.milestones or step == config.steps


def save_policy(config: TrainingConfig) -> SavePolicy:
    """When to save checkpoints and which to keep."""
    return SavePolicy(config.keep, config.save_every, config.milestones, config.background_saves)


def open_loader(task: Task, config: TrainingConfig, topology: Topology, progress: RunProgress) -> Loader:
    """The loader of this rank's micro-batches of the remaining steps."""
    count = config.micro_batches(topology.data_size, topology.layout.micro_batch_multiple)

    def plan(consumed: int) -> list[Any]:
        return step_samples(consumed, count, config.micro_batch, topology.data_rank, topology.data_size)

    remaining = config.steps - progress.step
    return Loader(task.load, plan, progress.consumed, config.global_batch, remaining, topology.device)


def check_skipped(progress: RunProgress, engine: Engine, config: TrainingConfig) -> None:
    """End a run that has skipped too many updates in a row.

    Raises:
        UserError: in that case.
    """
    history = engine.optimizer.detector.history
    spikes = 1 if config.spikes.action == "stop" else config.spikes.in_a_row
    if history.bad_in_a_row >= config.bad_steps:
        reason = f"the loss or its gradient was not finite for {config.bad_steps} steps running (training.bad_steps)"
    elif history.spikes_in_a_row >= spikes:
        reason = f"the loss or its gradient was a spike for {spikes} steps running (training.spikes)"
    else:
        return
    raise UserError(
        f"training stopped at step {progress.step}: {reason}; the weights are those of the last good step, and "
        "metrics.jsonl names the documents of the skipped steps; try a lower learning rate."
    )


def check(task: Task, config: TrainingConfig, topology: Topology, folder: RunFolder) -> None:
    """Refuse settings that cannot work, before anything is written.

    Raises:
        UserError: naming them.
    """
    config.micro_batches(topology.data_size, topology.layout.micro_batch_multiple)
    if not folder.checkpoints.exists():
        check_samples(task, config, RunProgress())
    timeout = topology.layout.timeout_minutes
    if config.hang_minutes >= timeout:  # a collective that times out ends the run without stacks
        raise UserError(
            f"training.hang_minutes={config.hang_minutes:g} is not below parallel.timeout_minutes={timeout:g}, which "
            "would end the run first and say less: lower the one or raise the other."
        )
