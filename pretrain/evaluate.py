"""Score trained models side by side, or show the health of an autoencoder, on held-out documents or on a text."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from calm_core.autoencoder.artefact import load_autoencoder
from calm_core.config import command
from calm_core.config.experiment import EvaluationConfig
from calm_core.data.store import TokenStore
from calm_core.errors import UserError
from calm_core.evaluation.autoencoder_health import examine_autoencoder, find_autoencoder, paths_of_autoencoder
from calm_core.evaluation.comparison import tokens_of_text
from calm_core.evaluation.tables import autoencoder_table, checkpoint_table, comparison_table
from calm_core.io import write_json
from calm_core.report.curves import plot_noise_curve
from calm_core.tokenizer import load_tokenizer

SEED = 0  # of the noise; another one than a training's would do as well


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
    parser.add_argument("--places", type=int, default=0, help="scored places of a window; 0, the default: all")
    parser.add_argument("--windows", type=int, default=0, help="windows a model is scored on; 0, the default: all")
    parser.add_argument("--samples", type=int, default=16, help="its samples per position (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=8, help="windows at once (default: %(default)s)")
    parser.add_argument(
        "--chunks", type=int, default=8192, help="most chunks an autoencoder is scored on (default: %(default)s)"
    )
    parser.add_argument(
        "--text",
        type=Path,
        help="txt, jsonl or parquet file to score on instead of held-out documents; needs no training data",
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
    autoencoders = [path for path in arguments.paths if find_autoencoder(path)]
    if autoencoders and len(arguments.paths) > 1:
        raise UserError(f"{autoencoders[0]} is an autoencoder, which compares with nothing: evaluate it by itself.")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result: Any
    with TemporaryDirectory() as scratch:
        if autoencoders:
            result = evaluate_autoencoder(find_autoencoder(autoencoders[0]), arguments, Path(scratch))
            print(autoencoder_table(result))
        else:
            result = evaluate_models(arguments, Path(scratch))
            if len(result) > 1:
                print(comparison_table(result))
            else:
                result = result[0]
                print(checkpoint_table(result))
    if arguments.output:
        write_json(arguments.output, result)
        if autoencoders:
            plot_noise_curve(result, arguments.output.with_suffix(".png"))
    if autoencoders and (rebuilt := result["token_accuracy"]) < arguments.least_rebuilt:
        raise UserError(
            f"{autoencoders[0]} rebuilds {rebuilt:.1%} of the held-out tokens, less than pipeline.least_rebuilt="
            f"{arguments.least_rebuilt:g}: train it longer or make it larger, or lower pipeline.least_rebuilt."
        )


def evaluate_autoencoder(folder: Path, arguments: Namespace, scratch: Path) -> dict[str, Any]:
    """Score an autoencoder on held-out documents, or on a text."""
    if arguments.text:
        store = tokens_of_text(arguments.text, load_tokenizer(paths_of_autoencoder(folder).tokenizer), scratch)
    else:
        store = TokenStore(arguments.tokens or paths_of_autoencoder(folder).tokens, "held_out")
    return examine_autoencoder(load_autoencoder(folder), store, arguments.chunks, SEED)


def evaluate_models(arguments: Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Score checkpoints on the held-out documents of their runs, or on a text."""
    from calm_core.config.parallel_config import ParallelConfig
    from calm_core.distributed.topology import distributed

    config = EvaluationConfig(arguments.windows, arguments.places, arguments.samples, arguments.micro_batch)
    with distributed(ParallelConfig()) as topology:
        from calm_core.evaluation.comparison import compare

        return compare(arguments.paths, arguments.text, arguments.context, SEED, config, topology.device, scratch)


if __name__ == "__main__":
    raise SystemExit(command.guard(main))
