"""Continue prompts with a trained model: a checkpoint folder and a prompt in, text out."""

import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

from calm_core.config import command
from calm_core.config.generation_config import METHODS, GenerationOptions
from calm_core.errors import UserError

MEANINGS = {field.name: f"{field.metadata['meaning']} (default: %(default)s)" for field in fields(GenerationOptions)}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, generate, print."""
    arguments = parser().parse_args(argv)
    if arguments.stream and len(arguments.prompt) + (arguments.prompt_file is not None) > 1:
        raise UserError("--stream shows one text as it comes: give one prompt, or leave out --stream.")
    options = GenerationOptions(
        **{field.name: getattr(arguments, field.name) for field in fields(GenerationOptions) if field.name != "stop"},
        stop=tuple(arguments.stop),
    )
    from calm_core.distributed.topology import local_dtype
    from calm_core.inference.generate import forecast, generate, summary
    from calm_core.inference.load_model import default_device, load_for_inference
    from calm_core.inference.request import read_prompts

    prompts, device = read_prompts(arguments.prompt, arguments.prompt_file), default_device()
    loaded = load_for_inference(arguments.checkpoint, device, local_dtype(arguments.precision, device))
    options = options.for_head(loaded.has_logits)
    if expected := forecast(loaded, prompts, options):
        print(f"[{expected}]", file=sys.stderr)
    if arguments.stream:
        print(prompts[0], end="", flush=True)
    show = (lambda _, text: print(text, end="", flush=True)) if arguments.stream else None
    start = time.perf_counter()
    completions = generate(loaded, prompts, options, on_text=show)
    seconds = time.perf_counter() - start
    for completion in completions:
        print("" if arguments.stream else f"{completion.prompt}{completion.text}")
        print(f"[{summary(completion, options)}]", file=sys.stderr)
    tokens = sum(len(completion.tokens) for completion in completions)
    print(f"[{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s]", file=sys.stderr)


def parser() -> command.Parser:
    """The arguments; those of the generation have the names and defaults of `GenerationOptions`."""
    defaults = GenerationOptions()
    parser = command.Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="a folder step-N, or of a run: its newest checkpoint")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; may be given again")
    parser.add_argument("--prompt-file", type=Path, help="a file whose whole text is a prompt")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "auto"),
        default="fp32",
        help="of weights and activations; auto is bf16 where it is faster (default: %(default)s)",
    )
    parser.add_argument("--stream", action="store_true", help="print the text as it comes")
    parser.add_argument("--stop", action="append", default=[], help=f"{MEANINGS['stop']}; may be given again")
    for name, kind in (("max_tokens", int), ("samples", int), ("max_calls", int), ("seed", int)):
        add(parser, name, defaults, type=kind)
    add(parser, "temperature", defaults, type=ratio, metavar="T")
    add(parser, "method", defaults, choices=METHODS)
    add(parser, "top_k", defaults, type=int, metavar="K")
    add(parser, "top_p", defaults, type=float, metavar="P")
    add(parser, "partial", defaults)
    return parser


def add(parser: command.Parser, name: str, defaults: GenerationOptions, **how: object) -> None:
    """An argument for the field `name` of the options."""
    parser.add_argument(f"--{name.replace('_', '-')}", default=getattr(defaults, name), help=MEANINGS[name], **how)


def ratio(text: str) -> float:
    """`1/2` or `0.5` as a number; ValueError if it is neither."""
    try:
        return float(Fraction(text))
    except ZeroDivisionError as error:
        raise ValueError(text) from error


if __name__ == "__main__":
    raise SystemExit(command.guard(main))
