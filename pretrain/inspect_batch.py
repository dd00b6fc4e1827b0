"""Name the documents behind the samples of one training step of RUN/calm or RUN/autoencoder."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from calm_core import config
from calm_core.config import command
from calm_core.config.experiment import Experiment
from calm_core.errors import UserError

if TYPE_CHECKING:
    from calm_core.data.dataset import TrainingSamples

SHOWN_TOKENS = 16


def inspect(argv: Sequence[str] | None = None) -> None:
    """Print a table: sample, window, the text it begins with, its documents."""
    parser = command.Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of a training run, such as runs/demo/calm")
    parser.add_argument("--step", type=int, required=True, help="training step, counted from 1")
    arguments = parser.parse_args(argv)
    import numpy as np

    from calm_core.data.dataset import read_batch
    from calm_core.tokenizer import load_tokenizer
    from calm_core.training.run_log import samples_of_step

    run = arguments.run if (arguments.run / "metrics.jsonl").exists() else arguments.run / "calm"
    if not (run / "config.yaml").exists():
        raise UserError(f"{arguments.run} holds no training run: give a folder such as runs/demo/calm.")
    experiment = config.load(Experiment, run / "config.yaml", [])
    experiment = replace(experiment, run=str(run.absolute().parent))  # the run may have been moved
    source = samples_of(run, experiment)
    tokenizer = load_tokenizer(experiment.paths.tokenizer)
    samples = samples_of_step(run, arguments.step)
    print(f"{'sample':>10}  {'window':>10}  documents, and the text that the sample begins with")
    for sample, (windows, window) in zip(samples, source.windows_of(np.array(samples)), strict=True):
        tokens = read_batch(windows, np.array([window]), np.array([sample]), ["tokens"]).tokens.flatten()[:SHOWN_TOKENS]
        text = " ".join(tokenizer.decode(tokens.tolist()).split())
        print(f'{sample:>10}  {window:>10}  {", ".join(windows.documents(window))}: "{text}"')


def samples_of(run: Path, experiment: Experiment) -> "TrainingSamples":
    """The samples of a run."""
    from calm_core.autoencoder.model import load_autoencoder
    from calm_core.data.dataset import TrainingSamples, chunk_rows, token_rows

    paths, data, seed = experiment.paths, replace(experiment.data, verify="size"), experiment.seed
    if run.name != paths.calm_run.name:
        return TrainingSamples(token_rows(data, paths).train, experiment.autoencoder_training.positions * data.k, seed)
    if experiment.head.reads_tokens:
        rows = token_rows(data, paths)
    else:
        rows = chunk_rows(data, paths, load_autoencoder(paths.autoencoder))
    return TrainingSamples(rows.train, experiment.training.positions, seed)


if __name__ == "__main__":
    raise SystemExit(command.guard(inspect))
