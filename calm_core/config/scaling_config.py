"""Studies: what each varies, and what all models of it share."""

from dataclasses import dataclass
from typing import Literal

from calm_core.config.experiment import Experiment
from calm_core.config.load_config import ROOT
from calm_core.config.schema import PathText, check, option
from calm_core.errors import UserError

DEFAULT_CONFIG = ROOT / "configs" / "scaling" / "two_cores.yaml"

CORRELATION_CONFIG = ROOT / "configs" / "studies" / "brier_correlation.yaml"

VARIANTS_CONFIG = ROOT / "configs" / "studies" / "token_loss.yaml"


@dataclass(frozen=True)
class LadderConfig:
    """The rule that makes a whole model from its depth.

    hidden = aspect x depth, rounded to whole attention heads; ffn = ffn_ratio x hidden, rounded to a multiple of 32;
    residual blocks of the head as `head.blocks` says (a quarter of the depth by default). Learning rate and batch are
    those of the reference depth times (depth / reference depth) to their exponents. Parameters grow as depth^3, so the
    defaults are learning rate ~ N^(-1/3) and batch ~ N^(2/3), as in OLMo's ladder.
    """

    depths: list[int] = option([8, 12, 16, 20], "layers of each model")
    aspect: int = option(64, "width of the residual stream per layer", at_least=1)
    head_width: int = option(64, "width of an attention head", at_least=1)
    ffn_ratio: float = option(2.6667, "width of the feed-forward layer over that of the residual stream")
    reference_depth: int = option(16, "depth for which learning_rate and batch_tokens are given", at_least=1)
    learning_rate: float = option(3e-4, "peak learning rate at the reference depth")
    learning_rate_exponent: float = option(-1.0, "exponent of the learning rate in depth / reference_depth")
    batch_tokens: int = option(1 << 20, "tokens per step at the reference depth", at_least=1)
    batch_exponent: float = option(2.0, "exponent of the batch in depth / reference_depth")

    def __post_init__(self) -> None:
        check(self, "ladder")
        if not self.depths or min(self.depths) < 1 or len(set(self.depths)) < len(self.depths):
            raise UserError(f"ladder.depths={self.depths} must hold different numbers of layers, each at least 1.")
        if self.head_width % 2:
            raise UserError(f"ladder.head_width={self.head_width} is odd: rotary positions rotate pairs of features.")
        if self.ffn_ratio <= 0 or self.learning_rate <= 0:
            raise UserError("ladder.ffn_ratio and ladder.learning_rate must be above 0.")


@dataclass(frozen=True)
class GridConfig:
    """The models of the study: every depth with every K, with the AR baseline, with every seed; and their budgets.

    A model is trained once, to the largest budget, at a constant learning rate, and evaluated at the smaller ones.
    """

    k: list[int] = option([1, 2, 4, 8], "tokens per chunk of the CALM models")
    baseline: bool = option(True, "train the AR baseline too")
    seeds: list[int] = option([0], "seeds of each model")
    context: int = option(2048, "tokens of a training window, the same for every K")
    latent_per_token: int = option(32, "dimensions of the autoencoder's latent for each token of a chunk", at_least=1)
    budget: Literal["flops", "tokens"] = option("flops", "what `budgets` counts: training FLOPs, or tokens")
    budgets: list[float] = option([1e18, 2e18, 4e18, 8e18], "budgets of each model")

    def __post_init__(self) -> None:
        check(self, "grid")
        if not self.k and not self.baseline:
            raise UserError("grid.k is empty and grid.baseline is false: there is nothing to train.")
        for k in self.k:
            if k not in (1, 2, 4, 8):
                raise UserError(f"grid.k holds {k}, which does not divide 8: choose from 1, 2, 4 and 8.")
            if self.context % k:
                raise UserError(f"grid.context={self.context} is not a multiple of K={k} (grid.k): change one of them.")
        for name in ("k", "seeds", "budgets"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UserError(f"grid.{name}={getattr(self, name)} has one of its values twice.")
        if not self.seeds or not self.budgets or min(self.budgets) <= 0:
            raise UserError("grid needs at least one seed and at least one budget, each above 0.")


@dataclass(frozen=True)
class FitConfig:
    """How laws are fitted and what they predict."""

    measures: list[str] = option(
        ["brier_1", "brier_2", "brier_lm"], "measures to fit: brier_1 .. brier_4, brier_lm, cross_entropy (AR alone)"
    )
    draws: int = option(200, "resamplings of the runs for confidence intervals")
    confidence: float = option(0.9, "probability that an interval covers")
    predict: list[float] = option([], "training FLOPs for which to predict the best model; empty: ten times the most")

    def __post_init__(self) -> None:
        check(self, "fit")
        known = ("brier_1", "brier_2", "brier_3", "brier_4", "brier_lm", "cross_entropy")
        for measure in self.measures:
            if measure not in known:
                raise UserError(f"fit.measures holds {measure!r}: choose from {', '.join(known)}.")
        if self.draws < 20 or not 0 < self.confidence < 1:
            raise UserError("fit needs draws >= 20 and 0 < confidence < 1.")


@dataclass(frozen=True)
class HardwareConfig:
    """The machine that the plan's hours are for."""

    devices: int = option(8, "devices that train one model")
    peak_tflops: float = option(989.0, "peak of one device in the training precision, TFLOP/s")
    mfu: float = option(0.4, "fraction of the peak that training reaches")

    def __post_init__(self) -> None:
        check(self, "hardware")
        if self.devices < 1 or self.peak_tflops <= 0 or not 0 < self.mfu <= 1:
            raise UserError("hardware needs devices >= 1, peak_tflops > 0 and 0 < mfu <= 1.")

    @property
    def flops_per_hour(self) -> float:
        """Floating-point operations of one model's devices in an hour."""
        return self.devices * self.peak_tflops * 1e12 * self.mfu * 3600


@dataclass(frozen=True)
class ScalingConfig:
    """A scaling study: one YAML file for plan, run, fit and plot."""

    run: PathText = option("runs/scaling", "folder of the study")
    task: int = option(-1, "the one model to train, by its number in the plan; -1 trains all")
    ladder: LadderConfig = option(LadderConfig, "from depth to model")
    grid: GridConfig = option(GridConfig, "models and budgets")
    fit: FitConfig = option(FitConfig, "laws and predictions")
    hardware: HardwareConfig = option(HardwareConfig, "for the hours of the plan")
    base: Experiment = option(Experiment, "what all models share; ladder and grid set shape, K, steps, rate and batch")

    @property
    def vocabulary(self) -> int:
        """V: as the data declares it, or as the tokenizer will have it."""
        return self.base.data.vocabulary or self.base.tokenizer.vocab_size


@dataclass(frozen=True)
class CorrelationConfig:
    """Autoregressive models of several widths, scored on the way through their training."""

    run: PathText = option("runs/brier_correlation", "folder of the experiment")
    widths: list[int] = option([32, 64, 128], "hidden sizes of the models; their feed-forward layers grow with them")
    evaluations: int = option(10, "evaluations of each model, at steps that grow geometrically")
    first: int = option(20, "step of the first one; the last is at base.training.steps")
    base: Experiment = option(Experiment, "what all models share; the head is softmax")

    def __post_init__(self) -> None:
        if not self.widths or self.evaluations < 2 or not 0 < self.first < self.base.training.steps:
            raise UserError(
                "brier_correlation needs at least one width, evaluations >= 2 and 0 < first < base.training.steps."
            )

    @property
    def steps(self) -> list[int]:
        """The steps after which each model is scored."""
        last = self.base.training.steps
        ratio = last / self.first
        return sorted({round(self.first * ratio ** (i / (self.evaluations - 1))) for i in range(self.evaluations)})


@dataclass(frozen=True)
class VariantConfig:
    """One variant: what it changes, and how often it is trained."""

    name: str = option("", "of the variant, and of the folders of its models")
    settings: list[str] = option([], "key=value that differ from `base`")
    seeds: list[int] = option([0], "one model each")
    share: float = option(1.0, "of the study's FLOPs, for a model that is only one half of a recipe", above=0)


@dataclass(frozen=True)
class VariantsConfig:
    """Variants of one experiment; the steps of each follow from its FLOPs."""

    run: PathText = option("runs/variants", "folder of the study")
    flops: float = option(1e13, "training FLOPs that each model executes, without its autoencoder", above=0)
    variants: list[VariantConfig] = option([], "what is compared, in the order in which it is trained")
    base: Experiment = option(Experiment, "what the variants share")

    def __post_init__(self) -> None:
        check(self, "")
        names = [variant.name for variant in self.variants]
        if not names or "" in names or len(set(names)) < len(names):
            raise UserError("variants must hold at least one variant, each with a name of its own.")
