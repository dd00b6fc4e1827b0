"""One experiment, one YAML file: every script reads the sections it needs from the same configuration."""

from dataclasses import dataclass
from pathlib import Path

from calm_core.config.data_config import DataConfig, TokenizerConfig
from calm_core.config.generation_config import GenerationOptions
from calm_core.config.model_config import AutoencoderConfig, BackboneConfig, HeadConfig, TokenLossConfig
from calm_core.config.schema import PathText, check, option
from calm_core.config.training_config import ParallelConfig, TrainingConfig
from calm_core.errors import UserError


@dataclass(frozen=True)
class SamplesConfig:
    """Prompts that a trained model continues, and a model in training if asked to."""

    prompts: list[str] = option(["The state of the Union is", ""], "texts to continue; empty begins a document")
    temperatures: list[float] = option(
        [1.0, 0.5], "temperatures of the continuations: each 1/n, or above 0 with head.kind=softmax", above=0
    )
    top_k: int = option(0, "head.kind=softmax: sample from the k most probable tokens alone; 0 means all", at_least=0)
    top_p: float = option(
        1.0, "head.kind=softmax: sample from the fewest tokens whose probabilities reach p", above=0, at_most=1
    )
    max_tokens: int = option(80, "tokens of each continuation, at most", at_least=1)
    while_training: bool = option(
        False, "continue the prompts at each evaluation too; rank 0 then holds the weights of the whole model"
    )
    word_texts: int = option(
        0,
        "texts of each temperature, as long as the context, whose words are looked up among those of the training "
        "documents (RUN/words.json); 0: none",
        at_least=0,
    )

    def __post_init__(self) -> None:
        check(self, "samples")

    def options(self, temperature: float, seed: int = 0) -> GenerationOptions:
        """How the prompts are continued at one of the temperatures."""
        return GenerationOptions(
            max_tokens=self.max_tokens, temperature=temperature, top_k=self.top_k, top_p=self.top_p, seed=seed
        )

    def require_head(self, head: HeadConfig) -> None:
        """Refuse what cannot apply to models with this head.

        Raises:
            UserError: naming the option.
        """
        for temperature in self.temperatures:
            try:
                self.options(temperature).for_head(has_logits=head.reads_tokens)
            except UserError as error:
                raise UserError(f"samples: {error}") from error


@dataclass(frozen=True)
class PipelineConfig:
    """How the stages of the workflow are started."""

    processes: int = option(
        2, "processes that train or score a model together; at most one per GPU where there are GPUs", at_least=1
    )
    nodes: int = option(0, "on a cluster: nodes that train a model; 0 means those of its launcher", at_least=0)
    shares: int = option(
        1, "on a cluster: tasks of an array that tokenize, and that encode chunks, together", at_least=1
    )

    least_rebuilt: float = option(
        0.95,
        "fraction of held-out tokens that the autoencoder must rebuild for the stages after it to run",
        at_least=0,
        at_most=1,
    )
    baseline: bool = option(
        False, "train an autoregressive model of the same training FLOPs in RUN/ar, scored and sampled in the same way"
    )

    def __post_init__(self) -> None:
        check(self, "pipeline")


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation of a model by its draws."""

    windows: int = option(
        64, "held-out windows scored during training; 0 means all of them", belongs_to="scores", at_least=0
    )
    places: int = option(
        32, "scored positions of a window, evenly spread over those there are; 0 means all of them", belongs_to="scores"
    )
    samples: int = option(
        16, "N, draws of the next tokens at each scored position; roll-outs if a chunk has under 4", belongs_to="scores"
    )
    micro_batch: int = option(8, "windows per forward pass", belongs_to="nothing")

    def __post_init__(self) -> None:
        # The variance that comes from the draws takes four of them to estimate.
        if self.samples < 4 or self.micro_batch < 1 or self.windows < 0 or self.places < 0:
            raise UserError("evaluation needs samples >= 4, micro_batch >= 1, windows >= 0 and places >= 0.")


@dataclass(frozen=True)
class ProfileConfig:
    """Which steps to profile."""

    steps: list[int] = option([], "first and last training step to profile, such as [10, 12]; [] profiles none")

    def __post_init__(self) -> None:
        if self.steps and not (len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[1]):
            raise UserError(
                f"profile.steps={self.steps} is not a range: give the first and the last step, as in [1, 2]."
            )


@dataclass(frozen=True)
class PlanConfig:
    """The machine that `--dry-run` counts with; a run itself uses what it finds.

    The defaults are those of nodes of 8 H100 SXM with InfiniBand of 400 Gbit/s a GPU: the peak is the vendor's; the
    fractions reached of it, of memory and of links are estimates until `benchmarks/step_time.py` measures them.
    """

    world: int = option(0, "ranks; 0 means those of this launch, or the fewest that the layout needs", at_least=0)
    device_memory_gib: float = option(80.0, "memory of one device", above=0)
    peak_tflops: float = option(
        989.0, "peak of one device in TFLOP/s: 989 is an H100's in bf16, 312 an A100's", above=0
    )
    matrix_share: float = option(0.6, "fraction of the peak that large matrix products reach", above=0, at_most=1)
    memory_gbs: float = option(2600.0, "GB/s that kernels read and write in a device's memory", above=0)
    launch_us: float = option(10.0, "microseconds of the host for each kernel that it launches", at_least=0)
    collective_us: float = option(20.0, "latency of a message in microseconds, besides its bytes", at_least=0)
    node_devices: int = option(8, "devices of a node", at_least=1)
    node_gbs: float = option(300.0, "GB/s that a device sends to others of its node (NVLink)", above=0)
    network_gbs: float = option(40.0, "GB/s that a device sends to other nodes (InfiniBand)", above=0)
    storage_gbs: float = option(5.0, "GB/s that all ranks together write to the file system", above=0)
    start_minutes: float = option(3.0, "minutes from the start of the job to the first step", at_least=0)
    corpus_tokens: float = option(
        0.0, "tokens of the corpus; 0 means those of the token store, or as many as are trained on", at_least=0
    )
    price: float = option(0.0, "price of a device for an hour, in any currency; 0 names none", at_least=0)
    mfu: float = option(
        0.0, "model FLOPs utilisation that the duration assumes; 0 predicts it by the parts of a step", at_least=0
    )

    def __post_init__(self) -> None:
        check(self, "plan")
        if self.mfu > 1:
            raise UserError(f"plan.mfu={self.mfu} is not a share of the peak: choose at most 1; 0 predicts it.")


@dataclass(frozen=True)
class Paths:
    """Where the artefacts of an experiment are."""

    tokenizer: Path
    tokens: Path
    autoencoder_run: Path
    autoencoder: Path
    chunks: Path
    calm_run: Path


@dataclass(frozen=True)
class Experiment:
    """Everything that a run from text to text depends on."""

    run: PathText = option("runs/demo", "folder of the experiment; holds its artefacts unless data.* says otherwise")
    config_file: str = option("", "the file that the experiment was first read from; scripts fill it in")
    seed: int = option(0, "seed of initial weights, sample order and noise", belongs_to="training")
    data: DataConfig = option(DataConfig, "corpus and stores")
    tokenizer: TokenizerConfig = option(TokenizerConfig, "training of the tokenizer")
    autoencoder: AutoencoderConfig = option(AutoencoderConfig, "shape of the autoencoder")
    autoencoder_training: TrainingConfig = option(TrainingConfig, "training of the autoencoder")
    model: BackboneConfig = option(BackboneConfig, "shape of the backbone")
    head: HeadConfig = option(HeadConfig, "generative head")
    parallel: ParallelConfig = option(ParallelConfig, "layout over ranks")
    training: TrainingConfig = option(TrainingConfig, "training of CALM")
    evaluation: EvaluationConfig = option(EvaluationConfig, "evaluation on held-out documents")
    samples: SamplesConfig = option(SamplesConfig, "texts that show what the model generates")
    profile: ProfileConfig = option(ProfileConfig, "profile of training steps")
    pipeline: PipelineConfig = option(PipelineConfig, "all stages as one command")
    plan: PlanConfig = option(PlanConfig, "the machine that --dry-run of a training counts with")

    def __post_init__(self) -> None:
        self.samples.require_head(self.head)
        if self.autoencoder_training.token_loss.weight:
            raise UserError("autoencoder_training.token_loss.weight has no effect on the autoencoder: set it to 0.")

    @property
    def token_loss(self) -> TokenLossConfig | None:
        """The side loss of the CALM network, if it has one."""
        side = self.training.token_loss
        return None if self.head.reads_tokens or not side.weight else side

    @property
    def paths(self) -> Paths:
        """Where the artefacts are: below `run`, or where `data` puts them."""
        run, data = Path(self.run), self.data
        return Paths(
            tokenizer=Path(data.tokenizer or run / "tokenizer" / "tokenizer.model"),
            tokens=Path(data.tokens or run / "tokens"),
            autoencoder_run=run / "autoencoder",
            autoencoder=Path(data.autoencoder or run / "autoencoder" / "frozen"),
            chunks=Path(data.chunks or run / "chunks"),
            calm_run=run / "calm",
        )
