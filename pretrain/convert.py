"""Exchange weights with the public reference implementation of CALM: `import` its folders, `export` to them.

A folder of the reference holds config.json and model.safetensors (or, to import, pytorch_model.bin; either may be in
shards) of an autoencoder or of CALM. The autoencoder becomes a frozen one; CALM becomes the folder of an experiment, to
generate and evaluate from, or to start training from by training.init_from=DST/calm/checkpoints/step-0. An exported
folder also opens in Hugging Face transformers: an autoregressive model is a Llama there; CALM needs the line
`import calm_core.integrations.huggingface` first.
"""

from collections.abc import Sequence
from pathlib import Path

from calm_core.config import command


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and convert."""
    parser = command.Parser(description=__doc__, allow_abbrev=False)
    ways = parser.add_subparsers(dest="way", required=True, metavar="import|export")
    inward = ways.add_parser("import", help="from the reference", allow_abbrev=False)
    outward = ways.add_parser("export", help="to the reference", allow_abbrev=False)
    inward.add_argument("source", type=Path, metavar="SRC", help="folder of a released model")
    inward.add_argument("target", type=Path, metavar="DST", help="folder of a frozen autoencoder, or an experiment's")
    inward.add_argument("--tokenizer", type=Path, help="the model's tokenizer; needed where an autoencoder is imported")
    outward.add_argument("source", type=Path, metavar="SRC", help="autoencoder, checkpoint step-N, or folder of a run")
    outward.add_argument("target", type=Path, metavar="DST", help="folder to write")
    arguments = parser.parse_args(argv)
    from calm_core.reference.convert import export_reference, import_reference

    if arguments.way == "import":
        made = import_reference(arguments.source, arguments.target, arguments.tokenizer)
    else:
        export_reference(arguments.source, arguments.target)
        made = arguments.target
    print(f"finished: {made}")


if __name__ == "__main__":
    raise SystemExit(command.guard(main))
