"""From an experiment to a training run: open the data, build the task, join the ranks, train."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from calm_core.autoencoder.model import Autoencoder, load_autoencoder
from calm_core.config.experiment import Experiment, PlanConfig
from calm_core.config.model_config import ModelShape
from calm_core.config.training_config import ParallelConfig, TrainingConfig
from calm_core.data.dataset import Blend, chunk_rows, token_rows
from calm_core.data.store import ALL, Store
from calm_core.distributed.collectives import on_every_rank, own_share, sum_over_ranks
from calm_core.distributed.topology import Topology, distributed
from calm_core.errors import ExitCode
from calm_core.plan.autoencoder_account import autoencoder_shape
from calm_core.plan.autoencoder_account import largest_micro_batch as fitting_autoencoder_batch
from calm_core.plan.search import GIB, largest_micro_batch
from calm_core.tokenizer import load_tokenizer
from calm_core.training.hardware import free_memory

if TYPE_CHECKING:
    from calm_core.training.calm_task import CalmTask

R = TypeVar("R")

PageWriter = Callable[[Path], object]  # brings the page of the experiment's folder up to date


def run_autoencoder(experiment: Experiment, write_page: PageWriter | None = None) -> ExitCode:
    """Train the autoencoder of an experiment and freeze it."""
    paths, data, config = experiment.paths, experiment.data, experiment.autoencoder_training
    with distributed(ParallelConfig()) as topology:
        from calm_core.training.autoencoder_task import AutoencoderTask
        from calm_core.training.loop import train as run
        from calm_core.training.run_log import RunFolder

        train, held_out = opened_together(partial(token_rows, data, paths))
        shape = autoencoder_shape(experiment.autoencoder, train.first.vocab_size, data.k)
        outputs = experiment.autoencoder.outputs(shape.vocabulary, config.positions * shape.k)
        choose = partial(fitting_autoencoder_batch, shape=shape, outputs=outputs, world=topology.world)
        config = _with_micro_batch(config, experiment.plan, topology, choose)
        task = AutoencoderTask(
            experiment.autoencoder, data.k, config.positions, experiment.seed, train, held_out, paths.autoencoder
        )
        experiment = replace(experiment, autoencoder_training=config)
        return run(task, config, topology, RunFolder(paths.autoencoder_run), experiment, write_page)


def run_calm(experiment: Experiment, write_page: PageWriter | None = None) -> ExitCode:
    """Train the CALM network of an experiment."""
    with distributed(experiment.parallel) as topology:
        from calm_core.training.loop import train as run
        from calm_core.training.run_log import RunFolder

        task = calm_task(experiment, opened_together(partial(calm_rows, experiment)), topology.device)
        choose = partial(largest_micro_batch, task.shape, layout=experiment.parallel, world=topology.world)
        config = _with_micro_batch(experiment.training, experiment.plan, topology, choose)
        folder = RunFolder(experiment.paths.calm_run)
        return run(task, config, topology, folder, replace(experiment, training=config), write_page)


def opened_together(open_rows: Callable[[slice], R]) -> R:
    """What `open_rows(share)` opens on every rank, the ranks sharing the verification of its shards. Collective.

    Raises:
        UserError: on every rank, if a store is missing or damaged for any of them.
    """
    opened: list[R] = []
    on_every_rank(lambda: opened.append(open_rows(own_share())))
    return opened[0]


def _with_micro_batch(
    training: TrainingConfig, plan: PlanConfig, topology: Topology, choose: Callable[..., TrainingConfig]
) -> TrainingConfig:
    """The settings with a micro-batch that fits every rank's memory, where they say `auto`. Collective.

    `choose(training=..., plan=...)` gives the largest that fits a device of the plan.
    """
    if training.micro_batch != "auto":
        return training
    free = min(on_every_rank(lambda: free_memory(topology.device)))
    counted = training if topology.device.type == "cuda" else replace(training, precision="fp32")  # no less than bf16
    found = choose(training=counted, plan=replace(plan, device_memory_gib=free / GIB)).micro_batch
    topology.say(f"micro_batch=auto: {found} samples, of {free / GIB:.3g} GiB that are free for a rank")
    return replace(training, micro_batch=found)


def calm_task(
    experiment: Experiment, rows: tuple[Blend, Store, Autoencoder | None], device: torch.device
) -> "CalmTask":
    """The task of training CALM on the rows that `calm_rows` opened."""
    from calm_core.inference.load_model import documents_of_data
    from calm_core.training.calm_task import CalmTask

    train, held_out, autoencoder = rows
    first, samples, paths = train.first, experiment.samples, experiment.paths
    return CalmTask(
        ModelShape(experiment.model, experiment.head, first.vocab_size, first.k, first.latent, experiment.token_loss),
        experiment.parallel,
        experiment.training.positions,
        experiment.seed,
        train,
        held_out,
        autoencoder and autoencoder.to(device),
        sum_over_ranks(lambda: first.token_counts(share=own_share()), device),
        experiment.evaluation,
        samples,
        documents_of_data(experiment.data, paths, train.identity),
        load_tokenizer(paths.tokenizer) if samples.while_training else None,
    )


def calm_rows(experiment: Experiment, share: slice = ALL) -> tuple[Blend, Store, Autoencoder | None]:
    """The training rows, the held-out rows, and the autoencoder that made their latents; `share` as in `chunk_rows`.

    A head that reads tokens takes them from the token store: it needs no autoencoder and ignores data.k.
    """
    paths, data = experiment.paths, experiment.data
    if experiment.head.reads_tokens:
        return *token_rows(data, paths, share), None
    autoencoder = load_autoencoder(paths.autoencoder)
    return *chunk_rows(data, paths, autoencoder, share), autoencoder
