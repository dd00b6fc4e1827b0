"""Tokenize the corpus into the token store RUN/tokens, split into training and held-out text.

Run again after a kill, it continues. Several machines divide the work by --shard i/n, one i each, and one --finish
after them completes the store: the same, to the byte, as one machine makes.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from calm_core.config import command
from calm_core.config.experiment import Experiment
from calm_core.data.builder import OPTIONS, ArrayTask, carry_out
from calm_core.data.corpus import Source, sources
from calm_core.data.split import held_out_tokens
from calm_core.data.tokens import TokenStoreBuild
from calm_core.io import read_manifest
from calm_core.tokenizer import load_tokenizer

SECTIONS = ("data",)


def prepare(experiment: Experiment, dry_run: bool, shard: ArrayTask | None = None, finish: bool = False) -> None:
    """Tokenize the corpus or one task of it, unless done already; or print what would be done."""
    data, paths = experiment.data, experiment.paths
    if dry_run and not paths.tokenizer.exists():
        print(_intention(sources(data.corpus), f"{paths.tokenizer} (not there yet)", paths.tokens))
        return
    build = TokenStoreBuild.begin(data, load_tokenizer(paths.tokenizer), paths.tokens, held_out_tokens(experiment))
    print(build.split, flush=True)
    if dry_run and not build.builder.is_complete:
        print(_intention([source for group in build.groups for source in group], paths.tokenizer, paths.tokens))
        return
    run = partial(build.run, workers=data.workers or len(os.sched_getaffinity(0)))
    if not carry_out(build.builder, run, build.finish, shard, finish):
        return
    manifest = read_manifest(paths.tokens, "tokens")
    for split, content in manifest["splits"].items():
        print(f"{split}: {content['documents']:,} documents, {content['tokens']:,} tokens")
    counts = {name: count for name, count in manifest["records"].items() if name != "examples"}
    print(f"records: {', '.join(f'{count:,} {name}' for name, count in counts.items())}")
    print(f"finished: {paths.tokens}")


def _intention(files: Sequence[Source], tokenizer: object, store: Path) -> str:
    size = sum(source.path.stat().st_size for source in files) / 1e6
    return f"would tokenize {len(files)} files of {size:,.1f} MB with {tokenizer}: {store}"


if __name__ == "__main__":
    raise SystemExit(command.run(__doc__, Experiment, SECTIONS, prepare, options=OPTIONS))
