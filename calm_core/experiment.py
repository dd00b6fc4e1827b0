"""One experiment, one YAML file: every script reads the sections it needs from the same configuration."""

from dataclasses import dataclass
from pathlib import Path

from calm_core.autoencoder import AutoencoderConfig
from calm_core.config import option
from calm_core.data.config import DataConfig
from calm_core.inference.config import SamplesConfig
from calm_core.model.config import BackboneConfig, HeadConfig
from calm_core.parallel.config import ParallelConfig
from calm_core.pipeline.config import PipelineConfig
from calm_core.plan.config import PlanConfig
from calm_core.tokenizer import TokenizerConfig
from calm_core.training.config import TrainingConfig
from calm_core.training.evaluation_config import EvaluationConfig
from calm_core.training.profile_config import ProfileConfig


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

    run: str = option("runs/demo", "folder of the experiment; its parts are below it unless data.* says otherwise")
    config_file: str = option("", "the file that the experiment was first read from; scripts fill it in")
    seed: int = option(0, "seed of initial weights, sample order and noise")
    data: DataConfig = option(DataConfig, "corpus and stores")
    tokenizer: TokenizerConfig = option(TokenizerConfig, "training of the tokenizer")
    autoencoder: AutoencoderConfig = option(AutoencoderConfig, "shape of the autoencoder")
    autoencoder_training: TrainingConfig = option(TrainingConfig, "training of the autoencoder")
    model: BackboneConfig = option(BackboneConfig, "shape of the backbone")
    head: HeadConfig = option(HeadConfig, "generative head")
    parallel: ParallelConfig = option(ParallelConfig, "layout over ranks")
    training: TrainingConfig = option(TrainingConfig, "training of CALM")
    evaluation: EvaluationConfig = option(EvaluationConfig, "evaluation on held-out documents")
    samples: SamplesConfig = option(SamplesConfig, "texts that show what the model says")
    profile: ProfileConfig = option(ProfileConfig, "profile of training steps")
    pipeline: PipelineConfig = option(PipelineConfig, "all stages as one command")
    plan: PlanConfig = option(PlanConfig, "the machine that --dry-run of a training counts with")

    @property
    def paths(self) -> Paths:
        """The artefacts' places: below `run`, or where `data` puts them."""
        run, data = Path(self.run), self.data
        return Paths(
            tokenizer=Path(data.tokenizer or run / "tokenizer" / "tokenizer.model"),
            tokens=Path(data.tokens or run / "tokens"),
            autoencoder_run=run / "autoencoder",
            autoencoder=Path(data.autoencoder or run / "autoencoder" / "frozen"),
            chunks=Path(data.chunks or run / "chunks"),
            calm_run=run / "calm",
        )
