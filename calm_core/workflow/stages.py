"""The stages from text to text: the script, product and launcher of each, and running them in order on one machine.

A new stage is an entry in `stages`, its script, and a launcher if no existing one fits.
"""

import os
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from calm_core import config as configuration
from calm_core.config.experiment import Experiment
from calm_core.config.load_config import ROOT
from calm_core.config.model_config import TokenLossConfig
from calm_core.config.training_config import ParallelConfig, TrainingConfig
from calm_core.data.corpus import fingerprint, sources
from calm_core.errors import ExitCode, UserError
from calm_core.plan.dry_run import model_shape
from calm_core.plan.flops import executed_training
from calm_core.workflow.ledger import Ledger, stamp
from calm_core.workflow.process import run_process

BASELINE = "ar"  # the folder of the baseline's experiment, in that of the experiment, and its name in those of stages


@dataclass(frozen=True)
class StageTraining:
    """The training that a stage runs.

    Attributes:
        folder: of the training run.
        config: its settings.
        layout: over ranks; None for a model that is only data parallel.
    """

    folder: Path
    config: TrainingConfig
    layout: ParallelConfig | None = None


@dataclass(frozen=True)
class Stage:
    """One script of the workflow.

    Attributes:
        name: of the stage.
        script: its path below the root of the project.
        arguments: of the script.
        product: the file that exists once the stage has succeeded.
        launcher: runs the stage on a cluster: a file of launchers/, without its ending.
        processes: that run the script together, under torchrun if more than one.
        shareable: whether the tasks of an array can share the work.
        training: that the script runs; None if it trains nothing.
        product_key: the configuration key by which the user names an existing product; empty if the run makes its own.
    """

    name: str
    script: str
    arguments: list[str]
    product: Path
    launcher: str = "evaluate"
    processes: int = 1
    shareable: bool = False
    training: StageTraining | None = None
    product_key: str = ""

    @property
    def given(self) -> bool:
        """Whether the configuration names an existing product, so that there is nothing to run."""
        return bool(self.product_key) and self.product.exists()

    @property
    def command(self) -> list[str]:
        """The command line."""
        script = [str(ROOT / self.script), *self.arguments]
        if self.processes == 1:
            return [sys.executable, *script]
        torchrun = ["-m", "calm_core.distributed.torchrun", "--standalone", "--nproc-per-node", str(self.processes)]
        return [sys.executable, *torchrun, *script]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that the script needs from its start, except those that the user has set."""
        wanted = {}
        if self.processes > 1:
            wanted["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // self.processes))
        if self.training and self.training.layout and self.training.layout.tensor > 1:
            # Megatron-core overlaps tensor-parallel communication by the order of kernels in a single queue. CUDA reads
            # this when the process first uses the GPU.
            wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
        return {name: value for name, value in wanted.items() if name not in os.environ}


def config_path(experiment: Experiment) -> Path:
    """Where the workflow writes the resolved configuration that all stages read."""
    return Path(experiment.run) / "config.yaml"


def save_configs(experiment: Experiment) -> None:
    """Write the configurations that the stages read: the experiment's, and its baseline's if it has one."""
    for each in _models(experiment).values():
        config_path(each).parent.mkdir(parents=True, exist_ok=True)
        configuration.save(each, config_path(each))


def stages(experiment: Experiment) -> list[Stage]:
    """All stages of an experiment, in order; a head that reads tokens needs no autoencoder and no chunks."""
    autoencoder = [] if experiment.head.reads_tokens else _autoencoder_stages(experiment)
    models = [stage for name, each in _models(experiment).items() for stage in _model_stages(name, each)]
    return [*_token_stages(experiment), *autoencoder, *models]


def _models(experiment: Experiment) -> dict[str, Experiment]:
    """The experiment of each model that is trained, by the name that its stages have."""
    compared = experiment.pipeline.baseline and not experiment.head.reads_tokens
    return {"calm": experiment, **({BASELINE: baseline(experiment)} if compared else {})}


def baseline(experiment: Experiment) -> Experiment:
    """The experiment in RUN/ar, on the tokens of `experiment`; with K=1, a softmax head and windows of as many tokens.

    Its steps have as many tokens as those of CALM, and its training executes the FLOPs of the whole CALM training, side
    loss included; the autoencoder's are not counted. Evaluations and checkpoints come after the same fractions of the
    run.
    """
    data, paths, training = experiment.data, experiment.paths, experiment.training
    head, positions = replace(experiment.head, kind="softmax"), training.positions * data.k
    calm = model_shape(experiment)
    ar = replace(calm, head=head, k=1, latent=0, token_loss=None)
    longer = executed_training(calm, training.positions) / executed_training(ar, positions)

    def share(steps: int) -> int:
        return max(1, round(steps * longer)) if steps else 0

    return replace(
        experiment,
        run=str(Path(experiment.run) / BASELINE),
        data=replace(data, tokenizer=str(paths.tokenizer), tokens=str(paths.tokens)),
        head=head,
        training=replace(
            training,
            steps=share(training.steps),
            positions=positions,
            token_loss=TokenLossConfig(),
            eval_every=share(training.eval_every),
            save_every=share(training.save_every),
            milestones=[share(step) for step in training.milestones],
        ),
        pipeline=replace(experiment.pipeline, baseline=False),
    )


def find_stage(experiment: Experiment, name: str) -> Stage:
    """The stage of a name.

    Raises:
        UserError: if the experiment has none.
    """
    plan = stages(experiment)
    for stage in plan:
        if stage.name == name:
            return stage
    raise UserError(f"There is no stage {name!r}: choose one of {', '.join(stage.name for stage in plan)}.")


def _token_stages(experiment: Experiment) -> list[Stage]:
    config, paths = [str(config_path(experiment))], experiment.paths
    return [
        Stage(
            "train_tokenizer",
            "data_prep/train_tokenizer.py",
            config,
            paths.tokenizer,
            launcher="tokenize",
            product_key=_product_key(experiment, "tokenizer"),
        ),
        Stage(
            "tokenize_corpus",
            "data_prep/tokenize_corpus.py",
            config,
            paths.tokens / "manifest.json",
            launcher="tokenize",
            shareable=True,
            product_key=_product_key(experiment, "tokens"),
        ),
    ]


def _autoencoder_stages(experiment: Experiment) -> list[Stage]:
    config, paths = [str(config_path(experiment))], experiment.paths
    result = paths.autoencoder_run / "evaluation.json"
    required = str(experiment.pipeline.least_rebuilt)
    train = Stage(
        "train_autoencoder",
        "pretrain/train_autoencoder.py",
        config,
        paths.autoencoder / "manifest.json",
        launcher="autoencoder",
        processes=_processes(experiment),
        training=StageTraining(paths.autoencoder_run, experiment.autoencoder_training),
        product_key=_product_key(experiment, "autoencoder"),
    )
    evaluate = Stage(
        "evaluate_autoencoder",
        "pretrain/evaluate.py",
        [
            *(str(paths.autoencoder), "--tokens", str(paths.tokens)),
            *("--output", str(result), "--least-rebuilt", required),
        ],
        result,
    )
    build = Stage(
        "build_chunks",
        "data_prep/build_chunks.py",
        config,
        paths.chunks / "manifest.json",
        launcher="build_chunks",
        shareable=True,
        product_key=_product_key(experiment, "chunks"),
    )
    return [train, evaluate, *([build] if experiment.data.latents == "stored" else [])]


def _model_stages(name: str, experiment: Experiment) -> list[Stage]:
    config, run = [str(config_path(experiment))], experiment.paths.calm_run
    result = run / "evaluation.json"
    # The baseline's own probabilities make its scores nearly exact from few roll-outs, and each takes four steps.
    draws = [] if name == "calm" else ["--samples", "4"]
    return [
        Stage(
            f"train_{name}",
            "pretrain/train_calm.py",
            config,
            run / "checkpoints" / f"step-{experiment.training.steps}" / "manifest.json",
            launcher="train",
            processes=_processes(experiment),
            training=StageTraining(run, experiment.training, experiment.parallel),
        ),
        Stage(
            f"evaluate_{name}",
            "pretrain/evaluate.py",
            [str(run), "--output", str(result), *draws],
            result,
            processes=_processes(experiment),
        ),
        Stage(
            "sample" if name == "calm" else f"sample_{name}",
            "pretrain/sample.py",
            config,
            Path(experiment.run) / "samples.json",
        ),
    ]


def _product_key(experiment: Experiment, name: str) -> str:
    return f"data.{name}" if getattr(experiment.data, name) else ""


def _processes(experiment: Experiment) -> int:
    wanted = experiment.pipeline.processes
    return min(wanted, torch.cuda.device_count() or wanted)


def inputs_of(experiment: Experiment, plan: list[Stage]) -> str:
    """Everything that the products of the stages depend on, for their stamps: configuration and corpus.

    The run's folder and the file that the configuration was read from are excluded: moving a run changes nothing.
    """
    corpus = "" if plan[1].given else fingerprint(sources(experiment.data.corpus))
    return configuration.to_yaml(replace(experiment, run="", config_file="")) + corpus


def require_given_products(plan: Iterable[Stage]) -> None:
    """Check that every product that the configuration names exists.

    It is not made here, since this run's settings may differ from those that it was meant to be made with.

    Raises:
        UserError: naming the product that is missing.
    """
    for stage in plan:
        if stage.product_key and not stage.given:
            key = stage.product_key
            raise UserError(
                f"{key} names {stage.product}, which is not there: make it first ({stage.script} with its own "
                f"configuration), or leave {key} empty to have it made in the run's folder."
            )


def run_stages(experiment: Experiment, names: Collection[str] | None = None) -> int:
    """Run the unfinished stages of these names, or of all; the exit code of the first one that fails.

    The seconds of a stage count all attempts; they and the stamps of finished stages are kept in RUN/stages.json.
    """
    run, plan = Path(experiment.run), stages(experiment)
    chosen = [stage for stage in plan if names is None or stage.name in names]
    require_given_products(chosen)
    save_configs(experiment)
    inputs, ledger = inputs_of(experiment, plan), Ledger(run / "stages.json")
    for number, stage in enumerate(plan, 1):
        if stage not in chosen:
            continue
        title = f"== {number}/{len(plan)} {stage.name}"
        products = [earlier.product for earlier in plan[:number] if earlier.given or earlier in chosen]
        before = ledger.seconds(stage.name)
        if stage.given:
            print(f"{title}: {stage.product} is given", flush=True)
        elif ledger.is_finished(stage.name, stamp(inputs, products)):
            print(f"{title}: finished before, in {before:.0f} s", flush=True)
        else:
            print(f"{title}: {' '.join([stage.script, *stage.arguments])}", flush=True)
            if code := run_process(stage.command, stage.environment, partial(_note, ledger, stage.name, before)):
                return code
            ledger.note(stage.name, ledger.seconds(stage.name), stamp(inputs, products))
            print(f"{title}: {ledger.seconds(stage.name) - before:.0f} s", flush=True)
    return ExitCode.OK


def _note(ledger: Ledger, stage: str, before: float, seconds: float) -> None:
    ledger.note(stage, before + seconds)
