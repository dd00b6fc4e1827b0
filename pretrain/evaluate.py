"""Score a trained model, or show the health of an autoencoder, on held-out documents or on a text."""

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from calm_core import command
from calm_core.autoencoder_artefact import load_autoencoder
from calm_core.data.manifest import write_json
from calm_core.data.opening import chunk_rows, token_rows
from calm_core.data.store import TokenStore
from calm_core.evaluation.autoencoder import examine_autoencoder, find_autoencoder, paths_of_autoencoder
from calm_core.evaluation.report import autoencoder_table, checkpoint_table
from calm_core.evaluation.text import chunks_of_text, tokens_of_text
from calm_core.plots import plot_noise_curve
from calm_core.tokenizer import load_tokenizer
from calm_core.training.evaluation_config import EvaluationConfig

SEED = 0  # of the noise; another one than a training's would do as well


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, print a table, write the numbers."""
    parser = command.Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("path", type=Path, help="checkpoint step-N, run folder, or folder of an autoencoder")
    parser.add_argument("--windows", type=int, default=0, help="windows a model is scored on; 0, the default: all")
    parser.add_argument("--samples", type=int, default=16, help="its samples per position (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=8, help="windows at once (default: %(default)s)")
    parser.add_argument(
        "--chunks", type=int, default=8192, help="most chunks an autoencoder is scored on (default: %(default)s)"
    )
    parser.add_argument(
        "--text", type=Path, help="txt, jsonl or parquet file to score on instead of held-out documents"
    )
    parser.add_argument("--tokens", type=Path, help="token store to score an autoencoder on that lies outside its run")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers; an autoencoder's plot goes beside it")
    arguments = parser.parse_args(argv)
    config = EvaluationConfig(arguments.windows, arguments.samples, arguments.micro_batch)
    with TemporaryDirectory() as scratch:
        if autoencoder := find_autoencoder(arguments.path):
            result = evaluate_autoencoder(autoencoder, arguments, Path(scratch))
            print(autoencoder_table(result))
        else:
            result = evaluate_model(arguments.path, arguments.text, config, Path(scratch))
            print(checkpoint_table(result))
    if arguments.output:
        write_json(arguments.output, result)
        if autoencoder:
            plot_noise_curve(result, arguments.output.with_suffix(".png"))


def evaluate_autoencoder(folder: Path, arguments: Namespace, scratch: Path) -> dict[str, Any]:
    """Score an autoencoder on held-out documents, or on a text."""
    if arguments.text:
        store = tokens_of_text(arguments.text, load_tokenizer(paths_of_autoencoder(folder).tokenizer), scratch)
    else:
        store = TokenStore(arguments.tokens or paths_of_autoencoder(folder).tokens, "held_out")
    return examine_autoencoder(load_autoencoder(folder), store, arguments.chunks, SEED)


def evaluate_model(path: Path, text: Path | None, config: EvaluationConfig, scratch: Path) -> dict[str, Any]:
    """Score a checkpoint on the held-out documents of its run, or on a text."""
    from calm_core.parallel.config import ParallelConfig
    from calm_core.parallel.topology import distributed

    with distributed(ParallelConfig()) as topology:
        from calm_core.evaluation.checkpoint import evaluate_checkpoint
        from calm_core.inference.load import experiment_of, find_checkpoint, load_for_inference
        from calm_core.parallel.checkpoint_folder import open_checkpoint

        experiment = experiment_of(open_checkpoint(find_checkpoint(path)))
        loaded = load_for_inference(path, topology.device)
        if loaded.autoencoder is None:
            rows, of_text = token_rows(experiment.data, experiment.paths), tokens_of_text
        else:
            rows = chunk_rows(experiment.data, experiment.paths, loaded.autoencoder)
            of_text = partial(chunks_of_text, autoencoder=loaded.autoencoder, packing=rows.held_out.packing)
        held_out = of_text(text, tokenizer=loaded.tokenizer, folder=scratch) if text else rows.held_out
        return evaluate_checkpoint(loaded, rows.train.first, held_out, SEED, config)


if __name__ == "__main__":
    raise SystemExit(command.guard(main))
