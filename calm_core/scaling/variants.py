"""Variants of one experiment trained with the same FLOPs: their runs, and one table of what each has learned."""

import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

from calm_core import config as configuration
from calm_core.config.experiment import Experiment
from calm_core.config.model_config import HeadConfig
from calm_core.config.scaling_config import VariantConfig, VariantsConfig
from calm_core.evaluation.brier import interval_factor
from calm_core.evaluation.tables import table
from calm_core.io import read_json, write_json
from calm_core.plan.dry_run import model_shape, vocabulary
from calm_core.plan.flops import executed_training, parameters
from calm_core.training.run_log import read_metrics
from calm_core.workflow.stages import run_stages

DATA = ("train_tokenizer", "tokenize_corpus", "train_autoencoder", "evaluate_autoencoder", "build_chunks")

MEASURES = ("brier_1", "brier_2", "brier_3", "brier_4", "brier_lm", "loss")

Row = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """One model of a study: of a variant and a seed.

    Attributes:
        variant: that it belongs to.
        data: the experiment that makes its tokens, autoencoder and chunks; other models have it too.
        experiment: that trains it, in its own folder.
    """

    variant: VariantConfig
    data: Experiment
    experiment: Experiment

    @property
    def name(self) -> str:
        """The variant and the seed."""
        return f"{self.variant.name}-{self.experiment.seed}"

    @property
    def flops(self) -> float:
        """Training FLOPs that it executes."""
        return float(self.experiment.training.steps * step_flops(self.experiment))


def step_flops(experiment: Experiment) -> int:
    """FLOPs that one training step executes."""
    training = experiment.training
    return training.global_batch * executed_training(model_shape(experiment), training.positions)


def models(config: VariantsConfig) -> list[Model]:
    """Every model, in the order of the variants; those whose data is made by the same settings share it.

    Raises:
        UserError: if a variant's settings cannot be applied to the base.
    """
    run, found = Path(config.run), []
    made: dict[str, Experiment] = {}
    for variant, varied in zip(config.variants, _varied(config), strict=True):
        made_by = str((varied.data, varied.tokenizer, varied.autoencoder, varied.autoencoder_training))
        # Always with a head that reads latents: other variants may need the autoencoder and the chunks.
        data = made.setdefault(made_by, replace(varied, run=str(run / "data" / variant.name), head=HeadConfig()))
        given = {name: str(getattr(data.paths, name)) for name in ("tokenizer", "tokens", "autoencoder", "chunks")}
        experiment = replace(
            varied,
            data=replace(varied.data, **given, vocabulary=vocabulary(varied)),
            training=replace(
                varied.training, steps=round(config.flops * variant.share / step_flops(varied)), eval_every=0
            ),
        )
        for seed in variant.seeds:
            folder = run / "models" / f"{variant.name}-{seed}"
            found.append(Model(variant, data, replace(experiment, run=str(folder), seed=seed)))
    return found


def _varied(config: VariantsConfig) -> list[Experiment]:
    """The base with the settings of each variant."""
    with TemporaryDirectory() as scratch:
        base = Path(scratch) / "base.yaml"
        configuration.save(config.base, base)
        return [configuration.load(Experiment, base, variant.settings) for variant in config.variants]


def train(config: VariantsConfig) -> int:
    """Train and score the models one after another; finished models are skipped, interrupted ones resume.

    RUN/results.json has a row for each finished model; its `cpu_seconds` are processor time of all attempts.

    Returns:
        The exit code of the first stage that fails, or OK.
    """
    path = Path(config.run) / "results.json"
    rows: dict[str, Row] = {row["model"]: row for row in read_json(path)} if path.exists() else {}
    for model in models(config):
        stages = DATA[:2] if model.experiment.head.reads_tokens else DATA
        if code := run_stages(model.data, stages):
            return code
        before = _cpu_seconds()
        if code := run_stages(model.experiment, ("train_calm",)):
            return code
        spent = rows.get(model.name, {}).get("cpu_seconds", 0.0) + _cpu_seconds() - before
        rows[model.name] = row(model, spent)
        write_json(path, list(rows.values()))
    return 0


def row(model: Model, cpu_seconds: float) -> Row:
    """What a finished model is and what it has learned, from the last evaluation of its training."""
    experiment, last = model.experiment, read_metrics(model.experiment.paths.calm_run / "metrics.jsonl", "eval")[-1]
    training, shape = experiment.training, model_shape(experiment)
    return {
        "model": model.name,
        "variant": model.variant.name,
        "settings": model.variant.settings,
        "seed": experiment.seed,
        "parameters": sum(parameters(shape).values()),
        "steps": training.steps,
        "tokens": training.steps * training.global_batch * training.positions * shape.k,
        "flops": model.flops,
        "cpu_seconds": round(cpu_seconds, 1),
        "measure": last["measure"],
        **{f"{name}{end}": last.get(f"{name}{end}") for name in MEASURES for end in ("", "_error")},
    }


def report(rows: Sequence[Row]) -> str:
    """The rows as a table with a line for each variant: means over its seeds."""
    head = ["variant", "seeds", "tokens", "FLOPs", "CPU s", "Brier-1", "Brier-2", "Brier-3", "Brier-4", "loss"]
    lines = table(head, list(_lines(rows)))
    return "\n".join([*lines, "±: half of a 95 % interval over seeds, by Student's t; none of a single seed"])


def _lines(rows: Sequence[Row]) -> Iterator[list[str]]:
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        yield [
            name,
            str(len(own)),
            f"{own[0]['tokens'] / 1e6:.2f}M",
            f"{own[0]['flops']:.3g}",
            f"{mean(row['cpu_seconds'] for row in own):.0f}",
            *(_over_seeds([row[f"brier_{n}"] for row in own], ".3%") for n in range(1, 5)),
            _over_seeds([row["loss"] for row in own], ".3f"),
        ]


def _over_seeds(values: Sequence[float], form: str) -> str:
    shown = f"{mean(values):{form}}"
    if len(values) == 1:
        return shown
    return f"{shown} ± {interval_factor(len(values)) * stdev(values) / len(values) ** 0.5:{form}}"


def _cpu_seconds() -> float:
    """Processor time of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
