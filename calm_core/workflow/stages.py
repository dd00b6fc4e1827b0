"""The stages from text to text: which script makes what, their run in order, and how long each took."""

import os
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from calm_core import config as configuration
from calm_core.config.experiment import Experiment
from calm_core.data.corpus import fingerprint, sources
from calm_core.errors import ExitCode, UserError
from calm_core.io import new_hash, read_json, write_json
from calm_core.workflow.process import run_process


class Ledger:
    """The file `stages.json`: for each stage its seconds over all attempts, and the stamp of its last success."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stages: dict[str, dict[str, Any]] = read_json(path) if path.exists() else {}

    def seconds(self, stage: str) -> float:
        """Seconds spent on a stage so far, in attempts that failed or were killed too."""
        return self._stages.get(stage, {}).get("seconds", 0.0)

    def finished(self, stage: str, stamp: str | None) -> bool:
        """Whether the stage succeeded when everything was as `stamp` says."""
        return stamp is not None and self._stages.get(stage, {}).get("stamp") == stamp

    def note(self, stage: str, seconds: float, stamp: str | None = None) -> None:
        """Record the seconds of a stage so far and, once it has succeeded, its stamp."""
        self._stages[stage] = {"seconds": round(seconds, 1), "stamp": stamp}
        write_json(self._path, self._stages)


def stamp(inputs: str, products: Sequence[Path]) -> str | None:
    """A hash of `inputs` and of the files' content; None if a file is missing.

    The files are manifests, which name what they stand for by content hashes: whatever changes, changes the stamp.
    """
    digest = new_hash()
    digest.update(inputs.encode())
    for path in products:
        if not path.is_file():
            return None
        digest.update(path.read_bytes())
    return digest.hexdigest()


ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Stage:
    """One script of the way.

    Attributes:
        script: below the root of the project; its name is the stage's.
        arguments: of the script.
        product: the file that is there when the stage has succeeded.
        processes: that run the script together, under torchrun if more than one.
        named: the key that names a product to be taken as it is; empty where the stage makes one of its own.
    """

    name: str
    script: str
    arguments: list[str]
    product: Path
    processes: int = 1
    named: str = ""

    @property
    def given(self) -> bool:
        """Whether the product that the configuration names is there."""
        return bool(self.named) and self.product.exists()

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
        """Threads for each of several processes, unless the user has set them."""
        if self.processes == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // self.processes))}


def config_path(experiment: Experiment) -> Path:
    """Where the pipeline puts the resolved configuration that all stages read."""
    return Path(experiment.run) / "config.yaml"


def stages(experiment: Experiment) -> list[Stage]:
    """All stages of an experiment, in order; a head that reads tokens has use for neither autoencoder nor chunks."""
    data, paths, run = experiment.data, experiment.paths, Path(experiment.run)
    config = [str(config_path(experiment))]
    processes = min(experiment.pipeline.processes, torch.cuda.device_count() or experiment.pipeline.processes)
    last = paths.calm_run / "checkpoints" / f"step-{experiment.training.steps}" / "manifest.json"

    def data_stage(name: str, script: str, product: Path, key: str, processes: int = 1) -> Stage:
        named = f"data.{key}" if getattr(data, key) else ""
        return Stage(name, script, config, product, processes, named)

    def evaluation(name: str, of: Path, *arguments: str, product: Path) -> Stage:
        return Stage(name, "pretrain/evaluate.py", [str(of), *arguments, "--output", str(product)], product)

    tokens = [
        data_stage("train_tokenizer", "data_prep/train_tokenizer.py", paths.tokenizer, "tokenizer"),
        data_stage("tokenize_corpus", "data_prep/tokenize_corpus.py", paths.tokens / "manifest.json", "tokens"),
    ]
    autoencoder = [
        data_stage(
            "train_autoencoder",
            "pretrain/train_autoencoder.py",
            paths.autoencoder / "manifest.json",
            "autoencoder",
            processes,
        ),
        evaluation(
            "evaluate_autoencoder",
            paths.autoencoder,
            "--tokens",
            str(paths.tokens),
            product=run / "autoencoder" / "evaluation.json",
        ),
    ]
    chunks = data_stage("build_chunks", "data_prep/build_chunks.py", paths.chunks / "manifest.json", "chunks")
    latents = [*autoencoder, chunks] if data.latents == "stored" else autoencoder
    model = [
        Stage("train_calm", "pretrain/train_calm.py", config, last, processes),
        evaluation("evaluate_calm", paths.calm_run, product=paths.calm_run / "evaluation.json"),
        Stage("sample", "pretrain/sample.py", config, run / "samples.json"),
    ]
    return [*tokens, *([] if experiment.head.reads_tokens else latents), *model]


def inputs_of(experiment: Experiment, plan: list[Stage]) -> str:
    """All that the products of the stages depend on, for their stamps: configuration and corpus.

    Where the run lies and what file began it are no inputs: a folder that was moved is as finished as it was.
    """
    corpus = "" if plan[1].given else fingerprint(sources(experiment.data.corpus))
    return configuration.to_yaml(replace(experiment, run="", config_file="")) + corpus


def require_named(plan: Iterable[Stage]) -> None:
    """Refuse to make what the configuration says is made already, by settings that may not be those it was made with.

    Raises:
        UserError: naming the product that is not there.
    """
    for stage in plan:
        if stage.named and not stage.given:
            raise UserError(
                f"{stage.named} names {stage.product}, which is not there: make it first ({stage.script} with its own "
                f"configuration), or leave {stage.named} empty to have it made in the run's folder."
            )


def run_stages(experiment: Experiment, names: Collection[str] | None = None) -> int:
    """Run what is not finished yet, of the stages of these names or of all; the exit code of the first that fails.

    The seconds of a stage count all attempts; they and what was finished are kept in RUN/stages.json.
    """
    run, plan = Path(experiment.run), stages(experiment)
    chosen = [stage for stage in plan if names is None or stage.name in names]
    require_named(chosen)
    run.mkdir(parents=True, exist_ok=True)
    configuration.save(experiment, config_path(experiment))
    inputs = inputs_of(experiment, plan)
    ledger = Ledger(run / "stages.json")
    for number, stage in enumerate(plan, 1):
        products = [before.product for before in plan[:number] if before.given or before in chosen]
        title = f"== {number}/{len(plan)} {stage.name}"
        before = ledger.seconds(stage.name)
        if stage not in chosen:
            continue
        if stage.given:
            print(f"{title}: {stage.product} is given", flush=True)
            continue
        if ledger.finished(stage.name, stamp(inputs, products)):
            print(f"{title}: finished before, in {before:.0f} s", flush=True)
            continue
        print(f"{title}: {' '.join([stage.script, *stage.arguments])}", flush=True)
        code = run_process(stage.command, stage.environment, partial(_note, ledger, stage.name, before))
        if code:
            return code
        ledger.note(stage.name, ledger.seconds(stage.name), stamp(inputs, products))
        print(f"{title}: {ledger.seconds(stage.name) - before:.0f} s", flush=True)
    return ExitCode.OK


def _note(ledger: Ledger, stage: str, before: float, seconds: float) -> None:
    ledger.note(stage, before + seconds)
