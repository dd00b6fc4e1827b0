"""The models of a study: their names, shapes, budgets, and the experiment that trains each."""

from dataclasses import dataclass, replace
from pathlib import Path

from calm_core import flops
from calm_core.data.config import DataConfig
from calm_core.errors import UserError
from calm_core.experiment import Experiment
from calm_core.model.config import HeadConfig, ModelShape
from calm_core.scaling.config import ScalingConfig
from calm_core.scaling.ladder import Rung, rung

BASELINE = "ar"


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
        """Training FLOPs for `tokens` tokens in the paper's accounting, at this window."""
        return flops.paper_training(self.shape, 1, self.positions) * tokens

    @property
    def size(self) -> int:
        """N: parameters without the tables of V rows, whose share would differ between the families."""
        return model_size(self.shape)


def model_size(shape: ModelShape) -> int:
    """Parameters without the token table and, for the softmax head, without the output matrix."""
    output = flops.whole_head(shape).parameters if shape.head.kind == "softmax" else 0
    return sum(flops.parameters(shape).values()) - flops.embedding(shape).parameters - output


def shape_of(config: ScalingConfig, family: str, depth: int) -> ModelShape:
    """The shape of the family's model of this depth."""
    baseline = family == BASELINE
    k = 1 if baseline else int(family.removeprefix("k"))
    head: HeadConfig = replace(config.base.head, kind="softmax") if baseline else config.base.head
    latent = 0 if baseline else config.grid.latent_per_token * k
    backbone = rung(depth, config.ladder, config.base.model).backbone
    return ModelShape(backbone, head, config.vocabulary, k, latent)


def families(config: ScalingConfig) -> list[str]:
    """The families of the study, the baseline first."""
    return [*([BASELINE] if config.grid.baseline else []), *(f"k{k}" for k in config.grid.k)]


def points(config: ScalingConfig) -> list[Point]:
    """All models of a study, the cheap ones first.

    Raises:
        UserError: if the base cannot serve (a softmax head for CALM), or a budget is less than one step.
    """
    if config.base.head.kind == "softmax":
        raise UserError("base.head.kind=softmax leaves CALM without a head: choose another; grid.baseline adds the AR.")
    found = [
        _point(config, family, depth, seed)
        for depth in sorted(config.ladder.depths)
        for family in families(config)
        for seed in config.grid.seeds
    ]
    return sorted(found, key=lambda point: point.training_flops(point.tokens(point.steps)))


def shared_experiment(config: ScalingConfig) -> Experiment:
    """What all models share: tokenizer and tokens."""
    return replace(config.base, run=str(Path(config.run) / "shared"))


def family_experiment(config: ScalingConfig, k: int) -> Experiment:
    """What the CALM models of one K share: autoencoder and chunks."""
    base, run = config.base, Path(config.run) / f"k{k}"
    data = replace(_shared_data(config), k=k)
    positions = max(1, config.base.autoencoder_training.positions * config.base.data.k // k)
    return replace(
        base,
        run=str(run),
        data=data,
        autoencoder=replace(base.autoencoder, latent=config.grid.latent_per_token * k),
        # As many tokens a step for every K.
        autoencoder_training=replace(base.autoencoder_training, positions=positions),
    )


def experiment(config: ScalingConfig, point: Point) -> Experiment:
    """The experiment that trains one model, on the shared tokens or the family's chunks."""
    base, data = config.base, _shared_data(config)
    if point.family != BASELINE:
        of_family = family_experiment(config, point.k).paths
        data = replace(data, k=point.k, autoencoder=str(of_family.autoencoder), chunks=str(of_family.chunks))
    training = replace(
        base.training,
        steps=point.steps,
        eval_every=0,
        wandb_group=base.training.wandb_group or Path(config.run).name,
        milestones=list(point.budget_steps[:-1]),
        keep=max(base.training.keep, len(point.budget_steps)),
        global_batch=point.global_batch,
        positions=point.positions,
        optimizer=replace(base.training.optimizer, learning_rate=point.rung.learning_rate),
        schedule=replace(base.training.schedule, kind="constant"),
    )
    run = Path(config.run) / "points" / point.name
    return replace(
        base,
        run=str(run),
        seed=point.seed,
        data=data,
        model=point.rung.backbone,
        head=point.shape.head,
        training=training,
    )


def _shared_data(config: ScalingConfig) -> DataConfig:
    shared = shared_experiment(config).paths
    return replace(config.base.data, tokenizer=str(shared.tokenizer), tokens=str(shared.tokens))


def _point(config: ScalingConfig, family: str, depth: int, seed: int) -> Point:
    grid, micro = config.grid, config.base.training.micro_batch
    of_rung = rung(depth, config.ladder, config.base.model)
    shape = shape_of(config, family, depth)
    windows = max(1, round(of_rung.batch_tokens / grid.context / micro)) * micro
    per_token = flops.paper_training(shape, 1, grid.context // shape.k)
    tokens = [budget / per_token if grid.budget == "flops" else budget for budget in sorted(grid.budgets)]
    steps = tuple(round(count / (windows * grid.context)) for count in tokens)
    if steps[0] < 1 or len(set(steps)) < len(steps):
        raise UserError(
            f"grid.budgets come to {', '.join(map(str, steps))} steps of {windows * grid.context} tokens for "
            f"{family} at depth {depth}: raise or spread them, or lower ladder.batch_tokens."
        )
    return Point(family, depth, shape.k, seed, of_rung, shape, steps, windows, grid.context)


def hours(config: ScalingConfig, point: Point) -> float:
    """Hours of training on the configured hardware, by the FLOPs that this code executes."""
    samples = point.tokens(point.steps) / point.context
    return flops.executed_training(point.shape, point.positions) * samples / config.hardware.flops_per_hour
