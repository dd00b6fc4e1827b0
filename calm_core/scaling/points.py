"""The models of a study: their shapes and budgets, the experiment that trains each, and what all will cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from calm_core.config.data_config import DataConfig
from calm_core.config.experiment import Experiment
from calm_core.config.model_config import BackboneConfig, HeadConfig, ModelShape
from calm_core.config.scaling_config import LadderConfig, ScalingConfig
from calm_core.errors import UserError
from calm_core.evaluation.tables import table
from calm_core.io import MANIFEST, read_manifest
from calm_core.model import token_loss
from calm_core.plan import flops
from calm_core.plan.flops import AutoencoderShape
from calm_core.plan.layout import check_layout, pipeline_split

FFN_MULTIPLE = 32


@dataclass(frozen=True)
class Rung:
    """A model of the ladder.

    Attributes:
        backbone: its shape.
        learning_rate: peak.
        batch_tokens: tokens per step, before rounding to whole windows.
    """

    backbone: BackboneConfig
    learning_rate: float
    batch_tokens: float


def rung(depth: int, ladder: LadderConfig, base: BackboneConfig) -> Rung:
    """The model of `depth` layers by the rule of `LadderConfig`; what the rule does not name is as in `base`."""
    heads = max(1, round(ladder.aspect * depth / ladder.head_width))
    hidden = heads * ladder.head_width
    ffn = max(1, round(ladder.ffn_ratio * hidden / FFN_MULTIPLE)) * FFN_MULTIPLE
    relative = depth / ladder.reference_depth
    return Rung(
        replace(base, layers=depth, hidden=hidden, ffn=ffn, heads=heads, kv_groups=0),
        ladder.learning_rate * relative**ladder.learning_rate_exponent,
        ladder.batch_tokens * relative**ladder.batch_exponent,
    )


BASELINE = "ar"

FURTHER_SAVES = 8  # checkpoints at intervals, beside those of the budgets, at most


@dataclass(frozen=True)
class Point:
    """One model of the study.

    Attributes:
        family: `ar`, or `k` and K: models that differ in size and seed alone.
        depth: its rung of the ladder.
        k: K, tokens per chunk; 1 for the AR baseline.
        seed: of weights, order and noise.
        rung: backbone, learning rate and batch.
        shape: all that fixes its parameters.
        steps: to the largest budget.
        budget_steps: the step at which each budget is reached, smallest first.
        global_batch: windows per step.
        context: tokens of a window.
    """

    family: str
    depth: int
    k: int
    seed: int
    rung: Rung
    shape: ModelShape
    budget_steps: tuple[int, ...]
    global_batch: int
    context: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.family}-d{self.depth}-s{self.seed}"

    @property
    def steps(self) -> int:
        """Steps to the largest budget."""
        return self.budget_steps[-1]

    @property
    def positions(self) -> int:
        """Chunks of a window, S."""
        return self.context // self.k

    def tokens(self, step: int) -> int:
        """Tokens trained on after `step` steps."""
        return step * self.global_batch * self.context

    def training_flops(self, tokens: float) -> float:
        """Training FLOPs for `tokens` tokens (see `flops_per_token`)."""
        return flops_per_token(self.shape, self.positions) * tokens

    @property
    def size(self) -> int:
        """N: parameters without the tables of V rows, whose share would differ between the families."""
        return model_size(self.shape)


def model_size(shape: ModelShape) -> int:
    """Parameters without the token table and, for the softmax head, without the output matrix."""
    output = flops.head(shape).parameters if shape.head.kind == "softmax" else 0
    return sum(flops.parameters(shape).values()) - flops.embedding(shape).parameters - output


def flops_per_token(shape: ModelShape, positions: int) -> float:
    """Training FLOPs of a token: what the paper counts, and a token side loss, which the paper does not have."""
    side = token_loss.training_flops(shape, positions) / (positions * shape.k)
    return flops.paper_training(shape, 1, positions) + side


def shape_of(config: ScalingConfig, family: str, depth: int) -> ModelShape:
    """The shape of the family's model of this depth."""
    baseline = family == BASELINE
    k = 1 if baseline else int(family.removeprefix("k"))
    head: HeadConfig = replace(config.base.head, kind="softmax") if baseline else config.base.head
    latent = 0 if baseline else config.grid.latent_per_token * k
    backbone = rung(depth, config.ladder, config.base.model).backbone
    return ModelShape(backbone, head, config.vocabulary, k, latent, None if baseline else config.base.token_loss)


def families(config: ScalingConfig) -> list[str]:
    """The families of the study, the baseline first."""
    return [*([BASELINE] if config.grid.baseline else []), *(f"k{k}" for k in config.grid.k)]


def points(config: ScalingConfig) -> list[Point]:
    """All models of a study, in order of their training FLOPs.

    Raises:
        UserError: if the base does not fit (a softmax head for CALM, windows that depend on K, a layout that cannot
            hold a model), or a budget is less than one step.
    """
    if config.base.head.kind == "softmax":
        raise UserError("base.head.kind=softmax leaves CALM without a head: choose another; grid.baseline adds the AR.")
    if config.base.data.packing == "align" and len(families(config)) > 1:
        raise UserError(
            "base.data.packing=align begins windows at other tokens for every K, so scores cannot be compared: "
            "set it to pack."
        )
    found = [
        _point(config, family, depth, seed)
        for depth in sorted(config.ladder.depths)
        for family in families(config)
        for seed in config.grid.seeds
    ]
    return sorted(found, key=lambda point: point.training_flops(point.tokens(point.steps)))


def shared_experiment(config: ScalingConfig) -> Experiment:
    """What all models share: tokenizer and tokens."""
    return replace(config.base, run=str(Path(config.run) / "shared"), config_file=str(base_path(config)))


def base_path(config: ScalingConfig) -> Path:
    """The configuration that all models share; the page of each run marks what differs from it."""
    return (Path(config.run) / "base.yaml").absolute()


def family_experiment(config: ScalingConfig, k: int) -> Experiment:
    """What the CALM models of one K share: autoencoder and chunks."""
    base, training = config.base, config.base.autoencoder_training
    return replace(
        shared_experiment(config),
        run=str(Path(config.run) / f"k{k}"),
        data=replace(_shared_data(config), k=k),
        autoencoder=replace(base.autoencoder, latent=config.grid.latent_per_token * k),
        autoencoder_training=replace(
            training,
            positions=max(1, training.positions * base.data.k // k),  # as many tokens a step for every K
            wandb_group=training.wandb_group or _group(config),
        ),
    )


def experiment(config: ScalingConfig, point: Point) -> Experiment:
    """The experiment that trains one model, on the shared tokens or the family's chunks."""
    if point.family == BASELINE:
        inputs, data = shared_experiment(config), _shared_data(config)
    else:
        inputs = family_experiment(config, point.k)
        made = inputs.paths
        data = replace(inputs.data, autoencoder=str(made.autoencoder), chunks=str(made.chunks))
    training = config.base.training
    return replace(
        inputs,
        run=str(Path(config.run) / "points" / point.name),
        seed=point.seed,
        data=data,
        model=point.rung.backbone,
        head=point.shape.head,
        training=replace(
            training,
            steps=point.steps,
            eval_every=0,
            wandb_group=_group(config),
            milestones=list(point.budget_steps[:-1]),
            save_every=training.save_every and max(training.save_every, math.ceil(point.steps / FURTHER_SAVES)),
            keep=point.steps,  # all: the newest few would not be those of the budgets
            global_batch=point.global_batch,
            positions=point.positions,
            optimizer=replace(training.optimizer, learning_rate=point.rung.learning_rate),
            schedule=replace(training.schedule, kind="constant"),
        ),
    )


def _group(config: ScalingConfig) -> str:
    """The group in wandb of all runs of the study."""
    return config.base.training.wandb_group or Path(config.run).name


def _shared_data(config: ScalingConfig) -> DataConfig:
    shared = shared_experiment(config).paths
    return replace(config.base.data, tokenizer=str(shared.tokenizer), tokens=str(shared.tokens))


def _point(config: ScalingConfig, family: str, depth: int, seed: int) -> Point:
    grid, of_rung = config.grid, rung(depth, config.ladder, config.base.model)
    shape = shape_of(config, family, depth)
    together = _windows_together(config, shape, f"{family} at depth {depth}")
    windows = max(1, round(of_rung.batch_tokens / grid.context / together)) * together
    per_token = flops_per_token(shape, grid.context // shape.k)
    tokens = [budget / per_token if grid.budget == "flops" else budget for budget in sorted(grid.budgets)]
    steps = tuple(round(count / (windows * grid.context)) for count in tokens)
    if steps[0] < 1 or len(set(steps)) < len(steps):
        raise UserError(
            f"grid.budgets come to {', '.join(map(str, steps))} steps of {windows * grid.context} tokens for "
            f"{family} at depth {depth}: raise or spread them, or lower ladder.batch_tokens (a step takes at least "
            f"{together} windows: base.training.micro_batch on each of base.pipeline.processes)."
        )
    return Point(family, depth, shape.k, seed, of_rung, shape, steps, windows, grid.context)


def _windows_together(config: ScalingConfig, shape: ModelShape, name: str) -> int:
    """The number of windows that a batch must be a multiple of, so that the ranks of a model divide it evenly.

    Raises:
        UserError: if they cannot hold the model.
    """
    layout, ranks = config.base.parallel, config.base.pipeline.processes
    if ranks % (layout.tensor * layout.pipeline):
        raise UserError(
            f"base.pipeline.processes={ranks}, the ranks that train one model, is not a multiple of base.parallel."
            f"tensor={layout.tensor} x base.parallel.pipeline={layout.pipeline}: change one of them."
        )
    try:
        check_layout(shape, config.grid.context // shape.k, layout)
        pipeline_split(shape, config.grid.context // shape.k, layout)
    except UserError as refusal:
        raise UserError(f"{name} cannot be trained by the base's layout: {refusal}") from refusal
    return config.base.training.least_micro_batch * layout.data_parallel(ranks) * layout.micro_batch_multiple


def hours(config: ScalingConfig, point: Point) -> float:
    """Hours of training on the configured hardware, by the FLOPs that this code executes."""
    samples = point.tokens(point.steps) / point.context
    return flops.executed_training(point.shape, point.positions) * samples / config.hardware.flops_per_hour


def plan_table(config: ScalingConfig) -> str:
    """The models of the study, one per line, then the autoencoders, the totals, and warnings.

    parameters: all of the model; N: without the tables of V rows; FLOPs/token: of training, with N head samples (see
    `flops_per_token`); decoding: of inference, with the autoencoder's decoder; batch: tokens a step; hours: on the
    configured hardware, by the FLOPs that this code executes.
    """
    planned = points(config)
    head = ["model", "parameters", "N", "FLOPs/token", "decoding", "learning rate", "batch", "steps", "tokens", "FLOPs"]
    lines = table([*head, "hours"], [_row(config, point) for point in planned])
    calm = sorted({point.k for point in planned if not point.shape.head.reads_tokens})
    cost = {k: autoencoder_flops(config, k) for k in calm}
    total = sum(point.training_flops(point.tokens(point.steps)) for point in planned)
    hardware, shared = config.hardware, sum(cost.values())
    spent = sum(hours(config, point) for point in planned) + shared / hardware.flops_per_hour
    lines += [
        f"autoencoder of K={k}, trained once: {of_k:.3g} FLOPs, {of_k / hardware.flops_per_hour:.3g} hours"
        for k, of_k in cost.items()
    ]
    lines += [
        f"in total: {len(planned)} models, {total:.3g} FLOPs and {shared:.3g} for autoencoders, {spent:.3g} hours on "
        f"{hardware.devices} devices of {hardware.peak_tflops:g} TFLOP/s at {hardware.mfu:.0%} of their peak"
    ]
    return "\n".join([*lines, *_warnings(config, planned)])


def autoencoder_shape(config: ScalingConfig, k: int) -> AutoencoderShape:
    """The shape of the autoencoder that the models of this K share."""
    autoencoder = family_experiment(config, k).autoencoder
    vocabulary = config.vocabulary
    return AutoencoderShape(vocabulary, k, autoencoder.hidden, autoencoder.ffn_width, autoencoder.latent)


def autoencoder_flops(config: ScalingConfig, k: int) -> float:
    """FLOPs that the training of one autoencoder executes."""
    training = family_experiment(config, k).autoencoder_training
    chunks = training.steps * training.global_batch * training.positions
    return float(
        chunks * flops.autoencoder_training(autoencoder_shape(config, k))
    )  # too large for an integer of a table


def _warnings(config: ScalingConfig, planned: Sequence[Point]) -> list[str]:
    """A line for each condition that distorts the results, with the models concerned."""
    warmup, epoch = config.base.training.schedule.warmup, _epoch(config)
    early = [point.name for point in planned if point.budget_steps[0] <= 2 * warmup]
    read = {point.name: point.tokens(point.steps) / epoch for point in planned if epoch}
    again = [f"{name} ({epochs:.3g})" for name, epochs in read.items() if epochs > 1]
    lines = []
    if early:
        lines.append(
            f"warning: the first budget comes within twice the warm-up (base.training.schedule.warmup={warmup}) for "
            f"{', '.join(early)}: shorten it, or raise the least of grid.budgets"
        )
    if again:
        lines.append(
            f"warning: more than one epoch of the {epoch:,} tokens is read by {', '.join(again)}: "
            "give base.data.corpus more text, or lower the largest of grid.budgets"
        )
    return lines


def _epoch(config: ScalingConfig) -> int:
    """Tokens to train on; 0 if the token store does not exist yet, or a blend replaces it."""
    store = shared_experiment(config).paths.tokens
    if config.base.data.blend or not (store / MANIFEST).exists():
        return 0
    return read_manifest(store, "tokens")["splits"]["train"]["tokens"]


def _row(config: ScalingConfig, point: Point) -> list[str]:
    shape, tokens = point.shape, point.tokens(point.steps)
    decoder = None if shape.head.reads_tokens else autoencoder_shape(config, point.k)
    return [
        point.name,
        f"{sum(flops.parameters(shape).values()):,}",
        f"{point.size:,}",
        f"{point.training_flops(1):.3g}",
        f"{flops.paper_inference(shape, decoder, point.positions):.3g}",
        f"{point.rung.learning_rate:.2g}",
        f"{point.global_batch * point.context:,}",
        f"{point.steps:,}",
        f"{tokens:,}",
        f"{point.training_flops(tokens):.3g}",
        f"{hours(config, point):.3g}",
    ]
