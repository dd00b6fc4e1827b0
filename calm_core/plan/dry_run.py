"""`--dry-run` of the trainings: prints the resolved configuration and the plan; starts nothing and needs no data.

Where the data is there, the checks that the training makes of it before its first step are made too.
"""

import os
from collections.abc import Callable
from pathlib import Path

from calm_core import config as configuration
from calm_core.config.experiment import Experiment
from calm_core.config.model_config import ModelShape
from calm_core.errors import ExitCode, UserError
from calm_core.io import MANIFEST, read_manifest
from calm_core.model.costs import Load
from calm_core.plan import flops, table
from calm_core.plan.account import account, data_cost, evaluation_time, run_cost
from calm_core.plan.autoencoder_account import autoencoder_shape, describe
from calm_core.plan.flops import AutoencoderShape
from calm_core.plan.layout import check_layout, rank_groups
from calm_core.plan.search import candidates, largest_micro_batch

Check = Callable[[Experiment, int], list[Path]]
"""Makes the checks of a training over this many ranks; the artefacts that it misses."""


def plan_calm(experiment: Experiment, sections: tuple[str, ...], check: Check) -> ExitCode:
    """Print the plan of training CALM, after `check` has found that it can start.

    Raises:
        UserError: if the run could not start with this configuration.
    """
    layout, plan, shape = experiment.parallel, experiment.plan, model_shape(experiment)
    check_layout(shape, experiment.training.positions, layout)
    world = _world(experiment, layout.tensor * layout.pipeline)
    training = largest_micro_batch(shape, experiment.training, layout, plan, world)
    found = account(shape, training, layout, plan, world)
    evaluation = experiment.evaluation
    load = Load(training.positions, evaluation.micro_batch, layout)
    evaluating = evaluation_time(shape, load, plan, evaluation, found.data_size)
    parameters = sum(flops.parameters(shape).values())
    cost = run_cost(parameters, found.seconds, evaluating, training, plan, world)
    best = candidates(shape, training, plan, world)
    text = table.render(found, training, layout, plan, rank_groups(layout, world), cost, best)
    autoencoder = None if experiment.head.reads_tokens else _autoencoder_shape(experiment)
    trained_on = found.tokens_per_step * training.steps
    data = data_cost(autoencoder, shape.vocabulary, _corpus_tokens(experiment, trained_on), plan)
    checked = _checked(check(experiment, world))
    _print(experiment, sections, f"{text}\n\n{table.data_line(data)}\n{checked}")
    return ExitCode.OK


def plan_autoencoder(experiment: Experiment, sections: tuple[str, ...], check: Check) -> ExitCode:
    """Print the plan of training the autoencoder, after `check` has found that it can start.

    Raises:
        UserError: if the run could not start with this configuration.
    """
    world = _world(experiment, 1)
    text = describe(experiment, vocabulary(experiment), world)
    training = experiment.autoencoder_training
    trained_on = training.steps * training.global_batch * training.positions * experiment.data.k
    tokens = _corpus_tokens(experiment, trained_on)
    data = data_cost(_autoencoder_shape(experiment), vocabulary(experiment), tokens, experiment.plan)
    checked = _checked(check(experiment, world))
    _print(experiment, sections, f"{text}\n\n{table.data_line(data)}\n{checked}")
    return ExitCode.OK


def model_shape(experiment: Experiment) -> ModelShape:
    """The shape that the experiment describes; a real run reads vocabulary and latent from its stores."""
    head = experiment.head
    k, latent = (1, 0) if head.reads_tokens else (experiment.data.k, experiment.autoencoder.latent)
    return ModelShape(experiment.model, head, vocabulary(experiment), k, latent, experiment.token_loss)


def vocabulary(experiment: Experiment) -> int:
    """V: `data.vocabulary`, that of the token store, or that with which the tokenizer will be trained.

    Raises:
        UserError: if a tokenizer is named whose vocabulary size is in none of these.
    """
    data, tokens = experiment.data, experiment.paths.tokens
    if data.vocabulary:
        return data.vocabulary
    if (tokens / MANIFEST).exists():
        return read_manifest(tokens, "tokens")["vocab_size"]
    if data.tokenizer:
        raise UserError(f"data.vocabulary is not set, and the plan needs to know that of {data.tokenizer}: set it.")
    return experiment.tokenizer.vocab_size


def _corpus_tokens(experiment: Experiment, trained_on: int) -> float:
    """Tokens of the corpus: those of the plan, those of the token store, or as many as are trained on."""
    tokens = experiment.paths.tokens
    if experiment.plan.corpus_tokens:
        return experiment.plan.corpus_tokens
    if (tokens / MANIFEST).exists():
        splits = read_manifest(tokens, "tokens")["splits"].values()
        return sum(shard["tokens"] for split in splits for shard in split["shards"])
    return trained_on


def _autoencoder_shape(experiment: Experiment) -> AutoencoderShape:
    return autoencoder_shape(experiment.autoencoder, vocabulary(experiment), experiment.data.k)


def _checked(awaited: list[Path]) -> str:
    """What a dry run has checked, as a line."""
    if awaited:
        return f"checked: settings, run folder; not there yet, so not checked: {', '.join(map(str, awaited))}"
    return "checked as when the training starts: settings, run folder, data, the checkpoint that it starts from"


def _world(experiment: Experiment, least: int) -> int:
    return experiment.plan.world or int(os.environ.get("WORLD_SIZE", least))


def _print(experiment: Experiment, sections: tuple[str, ...], plan: str) -> None:
    """Print the resolved sections that a script reads and the plan; under torchrun on one rank only."""
    if os.environ.get("RANK", "0") != "0":
        return
    resolved = configuration.to_dict(experiment)
    chosen = {"run": experiment.run, "seed": experiment.seed, **{name: resolved[name] for name in sections}}
    print(f"{configuration.dump(chosen)}\n{plan}")
