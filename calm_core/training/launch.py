"""From an experiment to a training run: open the data, build the task, join the ranks, train."""

from typing import TYPE_CHECKING

import torch

from calm_core.autoencoder.artefact import load_autoencoder, save_autoencoder
from calm_core.autoencoder.model import Autoencoder
from calm_core.config.experiment import Experiment
from calm_core.config.model_config import ModelShape
from calm_core.config.parallel_config import ParallelConfig
from calm_core.data.dataset import Blend, chunk_rows, token_rows
from calm_core.data.store import Store
from calm_core.distributed.collectives import on_first_rank
from calm_core.distributed.topology import distributed
from calm_core.errors import ExitCode
from calm_core.manifest import MANIFEST
from calm_core.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from calm_core.distributed.engine import Engine
    from calm_core.training.calm_task import CalmTask


def run_autoencoder(experiment: Experiment) -> ExitCode:
    """Train the autoencoder of an experiment and freeze it."""
    paths, data = experiment.paths, experiment.data
    train, held_out = token_rows(data, paths)
    with distributed(ParallelConfig()) as topology:
        from calm_core.training.autoencoder_task import AutoencoderTask
        from calm_core.training.loop import train as run
        from calm_core.training.run_folder import RunFolder

        config = experiment.autoencoder_training
        task = AutoencoderTask(experiment.autoencoder, data.k, config.positions, experiment.seed, train, held_out)
        task.samples.require(config.steps * config.global_batch)

        def freeze(engine: "Engine") -> None:
            model, made_from = task.finished(engine), {"tokens": train.identity}
            on_first_rank(lambda: save_autoencoder(model, paths.autoencoder, train.first.tokenizer_hash, made_from))

        frozen = paths.autoencoder / MANIFEST
        return run(task, config, topology, RunFolder(paths.autoencoder_run), experiment, freeze, frozen)


def run_calm(experiment: Experiment) -> ExitCode:
    """Train the CALM network of an experiment."""
    paths, config = experiment.paths, experiment.training
    rows = calm_rows(experiment)
    with distributed(experiment.parallel) as topology:
        from calm_core.training.loop import train as run
        from calm_core.training.run_folder import RunFolder

        task = calm_task(experiment, rows, topology.device)
        task.samples.require(config.steps * config.global_batch)
        return run(task, config, topology, RunFolder(paths.calm_run), experiment)


def calm_task(
    experiment: Experiment, rows: tuple[Blend, Store, Autoencoder | None], device: torch.device
) -> "CalmTask":
    """What there is to train, on the rows that `calm_rows` opened."""
    from calm_core.training.calm_task import CalmTask

    train, held_out, autoencoder = rows
    first, samples = train.first, experiment.samples
    return CalmTask(
        ModelShape(experiment.model, experiment.head, first.vocab_size, first.k, first.latent),
        experiment.parallel,
        experiment.training.positions,
        experiment.seed,
        train,
        held_out,
        autoencoder and autoencoder.to(device),
        experiment.evaluation,
        samples,
        load_tokenizer(experiment.paths.tokenizer) if samples.while_training else None,
    )


def calm_rows(experiment: Experiment) -> tuple[Blend, Store, Autoencoder | None]:
    """What the network reads, to train on and held out, and the autoencoder behind its latents.

    A head that reads tokens takes them from the token store: it needs no autoencoder, and data.k does not concern it.
    """
    paths, data = experiment.paths, experiment.data
    if experiment.head.reads_tokens:
        return *token_rows(data, paths), None
    autoencoder = load_autoencoder(paths.autoencoder)
    return *chunk_rows(data, paths, autoencoder), autoencoder
