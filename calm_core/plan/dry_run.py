"""`--dry-run` of the trainings: prints the resolved configuration and the plan; starts nothing and needs no data."""

import os

from calm_core import config as configuration
from calm_core.config.experiment import Experiment
from calm_core.config.model_config import ModelShape
from calm_core.errors import ExitCode, UserError
from calm_core.manifest import MANIFEST, read_manifest
from calm_core.plan import table
from calm_core.plan.account import account
from calm_core.plan.autoencoder_account import describe
from calm_core.plan.layout import rank_groups


def plan_calm(experiment: Experiment, sections: tuple[str, ...]) -> ExitCode:
    """Print the plan of training CALM.

    Raises:
        UserError: if the run could not start with this configuration.
    """
    training, layout, plan = experiment.training, experiment.parallel, experiment.plan
    world = _world(experiment, layout.tensor * layout.pipeline)
    found = account(model_shape(experiment), training, layout, plan, world)
    text = table.render(found, training, layout, plan, rank_groups(layout, world))
    _print(experiment, sections, text)
    return ExitCode.OK


def plan_autoencoder(experiment: Experiment, sections: tuple[str, ...]) -> ExitCode:
    """Print the plan of training the autoencoder.

    Raises:
        UserError: if the run could not start with this configuration.
    """
    world = _world(experiment, 1)
    text = describe(experiment, vocabulary(experiment), world)
    _print(experiment, sections, text)
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


def _world(experiment: Experiment, least: int) -> int:
    return experiment.plan.world or int(os.environ.get("WORLD_SIZE", least))


def _print(experiment: Experiment, sections: tuple[str, ...], plan: str) -> None:
    """Print the resolved sections that a script reads and the plan; under torchrun on one rank only."""
    if os.environ.get("RANK", "0") != "0":
        return
    resolved = configuration.to_dict(experiment)
    chosen = {"run": experiment.run, "seed": experiment.seed, **{name: resolved[name] for name in sections}}
    print(f"{configuration.dump(chosen)}\n{plan}")
