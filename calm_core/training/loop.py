"""The training loop: batches in, updates out, with metrics, checkpoints and evaluations along the way."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
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
from calm_core.training.checks import RunProgress, check_start, resolved
from calm_core.training.hardware import StepProfiler, deterministic, explain_out_of_memory
from calm_core.training.reporter import Reporter
from calm_core.training.resume import is_finished, start, state_of
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
    settings = resolved(experiment)
    on_first_rank(lambda: check_start(task, config, topology.layout, topology.world, folder, settings))
    watchdog = Watchdog(config.hang_start_minutes, config.hang_minutes, topology.rank, folder.logs)
    out_of_memory = explain_out_of_memory(task.section)
    with deterministic(config.deterministic), out_of_memory, watchdog, ExitStack() as stack:
        on_first_rank(lambda: stack.enter_context(folder.locked()))
        if is_finished(task, config, topology, folder, settings):
            return ExitCode.OK
        engine, progress = start(task, config, topology, folder, settings)
        stack.callback(engine.close)
        on_first_rank(lambda: configuration.save(experiment, folder.config))
        run = Run(
            task,
            config,
            folder,
            engine,
            progress,
            settings,
            watchdog,
            stack.enter_context(Reporter(task, config, folder, engine, progress, settings, write_page)),
            stack.enter_context(Requests(folder.path)),
            stack.enter_context(Saver(folder.checkpoints, engine, save_policy(config))),
            stack.enter_context(open_loader(task, config, topology, progress)),
            stack.enter_context(StepProfiler(experiment.profile, folder.path / "profile", topology, progress.step)),
        )
        return run.to_the_end()


@dataclass
class Run:
    """A run in progress: what is trained, how far it is, and what accompanies its steps. All methods are collective."""

    task: Task
    config: TrainingConfig
    folder: RunFolder
    engine: Engine
    progress: RunProgress
    resolved: dict[str, Any]
    watchdog: Watchdog
    reporter: Reporter
    requests: Requests
    saver: Saver
    loader: Loader
    profiler: StepProfiler

    def to_the_end(self) -> ExitCode:
        """Train, save and evaluate until the last step, or until a request to stop."""
        evaluated = self.evaluate()  # if the process before this one saved the step but did not evaluate it
        while evaluated and self.progress.step < self.config.steps:
            self.step()
            self.save(now=self.progress.step == self.config.steps)
            evaluated = self.evaluate()
            asked = self.requests.agreed(self.engine.topology.device)
            if asked.save or asked.stop:
                self.save(now=True)
                self.requests.met(asked)
            if asked.stop:
                break
        if self.progress.step < self.config.steps or not evaluated:
            self.reporter.ended("stopped")
            self.engine.topology.say(
                f"stopped on request after step {self.progress.step}: a checkpoint is saved, run again to continue"
            )
            return ExitCode.STOPPED
        self.task.finish(self.engine)
        self.reporter.ended("finished")
        return ExitCode.OK

    def step(self) -> None:
        """One step: gradients of the global batch, one update unless it is skipped, one record."""
        task, config, engine, done = self.task, self.config, self.engine, self.progress.step
        self.profiler.begin(done + 1)
        batches, waited = self.loader.next()
        task.begin(done / config.steps)
        results = engine.forward_backward(task.forward_step, batches, Pass(config.positions, config.micro_batch))
        metrics = average_metrics(results, engine.topology)
        learning_rate = config.optimizer.learning_rate * learning_rate_factor(done, config.steps, config.schedule)
        update = engine.step(learning_rate, metrics["loss"])
        self.progress = self.progress.after(config.global_batch)
        self.reporter.step(self.progress, metrics, update, learning_rate, waited)
        check_skipped(self.progress, engine, config)
        self.profiler.end(self.progress.step)
        self.watchdog.alive(f"step {self.progress.step}")

    def save(self, now: bool) -> None:
        """Save this step if it is due, or in any case `now`; an evaluation waits for what is being written."""
        step = self.progress.step
        state = partial(state_of, self.progress, self.engine, self.resolved, self.task.identity)
        with self.reporter.paused():
            saved = self.saver.after_step(step, state, now, wait=is_evaluation_due(self.config, step))
            self.reporter.saved(step, saved)
        if saved:
            self.watchdog.alive(f"the checkpoint of step {saved[-1].step}")

    def evaluate(self) -> bool:
        """Evaluate this step if it is due and not yet evaluated; False if a request to stop ended that early."""
        step, topology = self.progress.step, self.engine.topology
        if not is_evaluation_due(self.config, step) or on_first_rank(lambda: is_evaluated(self.folder.metrics, step)):
            return True
        with self.reporter.paused():
            metrics = self.task.evaluate(self.engine, lambda: self.requests.agreed(topology.device).stop)
            if metrics is None:
                return False
            self.watchdog.alive(f"the scores after step {step}")
            self.reporter.evaluation(step, metrics, self.task.texts(self.engine))
        self.watchdog.alive(f"the evaluation after step {step}")
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
    stopped = UserError(
        f"training stopped at step {progress.step}: {reason}; metrics.jsonl names the documents of the skipped steps; "
        "try a lower learning rate: the next start continues from the last checkpoint."
    )
    stopped.on_all_ranks = True
    raise stopped
