"""Tokenize the corpus into the token store RUN/tokens, split by document into train and held-out.

Killed and run again it goes on where it was. Several machines share the work by --shard i/n, one i each, and one
--finish after them completes the store: the same, to the byte, that one machine makes.
"""

import os
from functools import partial

from calm_core.config import command
from calm_core.config.experiment import Experiment
from calm_core.data.builder import OPTIONS, Share, carry_out
from calm_core.data.tokens import TokenStoreBuild
from calm_core.manifest import read_manifest
from calm_core.tokenizer import load_tokenizer

SECTIONS = ("data",)


def prepare(experiment: Experiment, dry_run: bool, shard: Share | None = None, finish: bool = False) -> None:
    """Tokenize the corpus or a share of it, unless that is done; or print what would be done."""
    data, paths = experiment.data, experiment.paths
    if dry_run and not paths.tokenizer.exists():
        print(f"would tokenize {', '.join(data.corpus)} with {paths.tokenizer}, which is not there yet: {paths.tokens}")
        return
    build = TokenStoreBuild.begin(data, load_tokenizer(paths.tokenizer), paths.tokens)
    if dry_run and not build.builder.is_complete:
        files = [source for part in build.parts for source in part]
        size = sum(source.path.stat().st_size for source in files) / 1e6
        print(f"would tokenize {len(files)} files of {size:,.1f} MB with {paths.tokenizer}: {paths.tokens}")
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


if __name__ == "__main__":
    raise SystemExit(command.run(__doc__, Experiment, SECTIONS, prepare, options=OPTIONS))
