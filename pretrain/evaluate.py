"""Score trained models side by side, or show the health of an autoencoder, on held-out documents or on a text."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from calm_core.config import command
from calm_core.errors import UserError
from calm_core.io import prepare_output, write_json

SEED = 0  # of the noise; any would do


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, print a table, write the numbers."""
    parser = command.Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="checkpoint step-N or run folder, CALM or AR; several are compared; or an autoencoder's folder",
    )
    parser.add_argument(
        "--context", type=int, default=0, help="tokens of context; 0, the default: the most all were trained on"
    )
    parser.add_argument("--places", type=int, default=0, help="scored positions of a window; 0, the default: all")
    parser.add_argument("--windows", type=int, default=0, help="windows a model is scored on; 0, the default: all")
    parser.add_argument("--samples", type=int, default=16, help="draws at each scored position (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=8, help="windows at once (default: %(default)s)")
    parser.add_argument(
        "--protocol",
        choices=("default", "paper"),
        default="default",
        help="paper: score every position of 8,192-token blocks by two draws too, as the paper reports BrierLM",
    )
    parser.add_argument(
        "--chunks", type=int, default=8192, help="most chunks an autoencoder is scored on (default: %(default)s)"
    )
    parser.add_argument(
        "--text",
        type=Path,
        help="txt, jsonl or parquet file to score on instead of held-out documents; needs no training data",
    )
    parser.add_argument(
        "--text-field", default="", help="field or column of --text that holds the text (default: as in the run's data)"
    )
    parser.add_argument("--tokens", type=Path, help="token store to score an autoencoder on that lies outside its run")
    parser.add_argument(
        "--least-rebuilt",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="end with exit code 2 if an autoencoder rebuilds a smaller share of the tokens (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, help="JSON file for the numbers; an autoencoder's plot goes beside it")
    arguments = parser.parse_args(argv)
    if arguments.text_field and not arguments.text:
        raise UserError("--text-field names the field of a file that is scored: give the file by --text.")
    if arguments.output:
        prepare_output(arguments.output)
    from calm_core.evaluation.autoencoder_health import find_autoencoder

    autoencoders = [path for path in arguments.paths if find_autoencoder(path)]
    if autoencoders and len(arguments.paths) > 1:
        raise UserError(f"{autoencoders[0]} is an autoencoder, which cannot be compared: evaluate it by itself.")
    evaluate = evaluate_autoencoder if autoencoders else evaluate_models
    with TemporaryDirectory() as scratch:
        evaluate(arguments, Path(scratch))


def evaluate_autoencoder(arguments: Namespace, scratch: Path) -> None:
    """Score an autoencoder on held-out documents, or on a text."""
    import torch

    from calm_core.autoencoder.model import load_autoencoder
    from calm_core.data.store import TokenStore
    from calm_core.evaluation.autoencoder_health import examine_autoencoder, experiment_of_autoencoder, find_autoencoder
    from calm_core.evaluation.checkpoint import ScoredText, tokens_of_text
    from calm_core.evaluation.tables import autoencoder_table
    from calm_core.report.figure import plot_noise_curve
    from calm_core.tokenizer import load_tokenizer

    folder = find_autoencoder(arguments.paths[0])
    if arguments.text:
        experiment = experiment_of_autoencoder(folder)
        text, tokenizer = ScoredText(arguments.text, arguments.text_field), load_tokenizer(experiment.paths.tokenizer)
        store = tokens_of_text(text, tokenizer, experiment.data, scratch)
    else:
        store = TokenStore(arguments.tokens or experiment_of_autoencoder(folder).paths.tokens, "held_out")
    model = load_autoencoder(folder, "cuda" if torch.cuda.is_available() else "cpu")
    result = examine_autoencoder(model, store, arguments.chunks, SEED)
    print(autoencoder_table(result))
    if arguments.output:
        write_json(arguments.output, result)
        plot_noise_curve(result, arguments.output.with_suffix(".png"))
    if (rebuilt := result["token_accuracy"]) < arguments.least_rebuilt:
        raise UserError(
            f"{folder} rebuilds {rebuilt:.1%} of the held-out tokens, less than pipeline.least_rebuilt="
            f"{arguments.least_rebuilt:g}: train it longer or make it larger, or lower pipeline.least_rebuilt."
        )


def evaluate_models(arguments: Namespace, scratch: Path) -> None:
    """Score checkpoints on the held-out documents of their runs, or on a text."""
    from calm_core.config.experiment import EvaluationConfig
    from calm_core.config.training_config import ParallelConfig
    from calm_core.distributed.topology import distributed
    from calm_core.evaluation.tables import checkpoint_table, comparison_table

    config = EvaluationConfig(arguments.windows, arguments.places, arguments.samples, arguments.micro_batch)
    with distributed(ParallelConfig()) as topology:
        from calm_core.evaluation.checkpoint import ScoredText, compare

        text = ScoredText(arguments.text, arguments.text_field) if arguments.text else None
        results = compare(arguments.paths, text, arguments.context, SEED, config, topology, scratch, arguments.protocol)
        if topology.rank == 0:
            found: Any = results if len(results) > 1 else results[0]
            print(comparison_table(results) if len(results) > 1 else checkpoint_table(found))
            if arguments.output:
                write_json(arguments.output, found)


if __name__ == "__main__":
    raise SystemExit(command.guard(main))
