"""From an experiment to a training run: open the data, build the task, check both; join the ranks, train."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from calm_core.autoencoder.model import Autoencoder, load_autoencoder
from calm_core.config.experiment import Experiment, PlanConfig
from calm_core.config.model_config import ModelShape
from calm_core.config.training_config import ParallelConfig, TrainingConfig
from calm_core.data.dataset import Blend, Rows, chunk_rows, store_folders, token_rows
from calm_core.data.store import ALL, Store
from calm_core.distributed.collectives import on_every_rank, own_share, sum_over_ranks
from calm_core.distributed.topology import Topology, distributed
from calm_core.errors import ExitCode
from calm_core.evaluation.held_out import scored_offsets
from calm_core.io import MANIFEST
from calm_core.plan.autoencoder_account import autoencoder_shape
from calm_core.plan.autoencoder_account import largest_micro_batch as fitting_autoencoder_batch
from calm_core.plan.search import GIB, largest_micro_batch
from calm_core.tokenizer import load_tokenizer
from calm_core.training.checks import check_settings, check_start, resolved
from calm_core.training.hardware import free_memory
from calm_core.training.run_log import RunFolder

if TYPE_CHECKING:
    from calm_core.training.autoencoder_task import AutoencoderTask
    from calm_core.training.calm_task import CalmTask

R = TypeVar("R")

PageWriter = Callable[[Path], object]  # brings the page of the experiment's folder up to date


def run_autoencoder(experiment: Experiment, write_page: PageWriter | None = None) -> ExitCode:
    """Train the autoencoder of an experiment and freeze it."""
    paths, data, config = experiment.paths, experiment.data, experiment.autoencoder_training
    with distributed(ParallelConfig()) as topology:
        from calm_core.training.loop import train as run

        rows = opened_together(partial(token_rows, data, paths))
        shape = autoencoder_shape(experiment.autoencoder, rows.train.first.vocab_size, data.k)
        outputs = experiment.autoencoder.outputs(shape.vocabulary, config.positions * shape.k)
        choose = partial(fitting_autoencoder_batch, shape=shape, outputs=outputs, world=topology.world)
        config = _with_micro_batch(config, experiment.plan, topology, choose)
        task = autoencoder_task(experiment, rows)
        experiment = replace(experiment, autoencoder_training=config)
        return run(task, config, topology, RunFolder(paths.autoencoder_run), experiment, write_page)


def run_calm(experiment: Experiment, write_page: PageWriter | None = None) -> ExitCode:
    """Train the CALM network of an experiment."""
    with distributed(experiment.parallel) as topology:
        from calm_core.training.loop import train as run

        rows = opened_together(partial(calm_rows, experiment))
        task = calm_task(experiment, rows, topology.device)
        choose = partial(largest_micro_batch, task.shape, layout=experiment.parallel, world=topology.world)
        config = _with_micro_batch(experiment.training, experiment.plan, topology, choose)
        folder = RunFolder(experiment.paths.calm_run)
        return run(task, config, topology, folder, replace(experiment, training=config), write_page)


def check_autoencoder(experiment: Experiment, world: int) -> list[Path]:
    """Those checks of `run_autoencoder` that need neither ranks nor a GPU; nothing is written.

    Returns:
        The artefacts that are not there yet, for which the checks of the data wait.

    Raises:
        UserError: as the training would.
    """
    config, layout, folder = (
        experiment.autoencoder_training,
        ParallelConfig(),
        RunFolder(experiment.paths.autoencoder_run),
    )
    check_settings(config, layout, world, folder)
    awaited = _not_there(store_folders(experiment.data, "tokens", experiment.paths))
    if not awaited:
        task = autoencoder_task(experiment, token_rows(experiment.data, experiment.paths))
        check_start(task, config, layout, world, folder, resolved(experiment))
    return awaited


def check_calm(experiment: Experiment, world: int) -> list[Path]:
    """Those checks of `run_calm` that need neither ranks nor a GPU, as `check_autoencoder`."""
    data, paths, config, layout = experiment.data, experiment.paths, experiment.training, experiment.parallel
    folder = RunFolder(paths.calm_run)
    check_settings(config, layout, world, folder)
    reads_tokens = experiment.head.reads_tokens
    stores = store_folders(data, "tokens" if reads_tokens or data.latents == "encode" else "chunks", paths)
    awaited = _not_there(stores if reads_tokens else [paths.autoencoder, *stores])
    if experiment.samples.while_training and not paths.tokenizer.exists():
        awaited.append(paths.tokenizer)
    if awaited:  # what the shape alone says; the plan has checked that the layout fits it
        scored_offsets(config.positions, 1 if reads_tokens else data.k)
    else:
        task = _calm_task(experiment, calm_rows(experiment), torch.device("cpu"))
        check_start(task, config, layout, world, folder, resolved(experiment))
    return awaited


def _not_there(artefacts: list[Path]) -> list[Path]:
    return [folder for folder in artefacts if not (folder / MANIFEST).exists()]


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


def autoencoder_task(experiment: Experiment, rows: Rows) -> "AutoencoderTask":
    """The task of training the autoencoder on single tokens."""
    from calm_core.training.autoencoder_task import AutoencoderTask

    return AutoencoderTask(
        experiment.autoencoder,
        experiment.data.k,
        experiment.autoencoder_training.positions,
        experiment.seed,
        *rows,
        experiment.paths.autoencoder,
    )


def calm_task(
    experiment: Experiment, rows: tuple[Blend, Store, Autoencoder | None], device: torch.device
) -> "CalmTask":
    """The task of training CALM on the rows that `calm_rows` opened. Collective: the ranks count the tokens together.

    Raises:
        UserError: if the rows do not fit the model, or their documents are too few.
    """
    first = rows[0].first
    counts = sum_over_ranks(lambda: first.token_counts(share=own_share()), device)
    return _calm_task(experiment, rows, device, counts)


def _calm_task(
    experiment: Experiment,
    rows: tuple[Blend, Store, Autoencoder | None],
    device: torch.device,
    token_counts: np.ndarray | None = None,
) -> "CalmTask":
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
        token_counts,
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
