"""Encode the token store with the frozen autoencoder into the chunk store RUN/chunks.

Run again after a kill, it continues. Several machines divide the work by --shard i/n, one i each, and one --finish
after them completes the store.
"""

from calm_core.config import command
from calm_core.config.experiment import Experiment
from calm_core.data.builder import OPTIONS, ArrayTask, carry_out
from calm_core.errors import UserError
from calm_core.io import read_manifest

SECTIONS = ("data",)


def prepare(experiment: Experiment, dry_run: bool, shard: ArrayTask | None = None, finish: bool = False) -> None:
    """Encode the chunks or one task of them, unless done already; or print what would be done."""
    from calm_core.autoencoder.model import load_autoencoder
    from calm_core.data.chunks import ChunkStoreBuild

    data, paths = experiment.data, experiment.paths
    if dry_run and not (paths.tokens.exists() and paths.autoencoder.exists()):
        print(f"would encode {paths.tokens} with {paths.autoencoder}, which do not both exist yet: {paths.chunks}")
        return
    autoencoder = load_autoencoder(paths.autoencoder, device_of(data.device))
    if autoencoder.k != data.k:
        raise UserError(
            f"data.k={data.k}, but the autoencoder {paths.autoencoder} is made for {autoencoder.k} tokens per chunk: "
            f"set data.k={autoencoder.k} or train another autoencoder."
        )
    build = ChunkStoreBuild.begin(paths.tokens, autoencoder, paths.chunks, data.verify, data.packing)
    if dry_run and not build.builder.is_complete:
        print(f"would encode {paths.tokens} in chunks of {data.k} tokens with {paths.autoencoder}: {paths.chunks}")
        return
    if not carry_out(build.builder, build.run, build.finish, shard, finish):
        return
    manifest = read_manifest(paths.chunks, "chunks")
    for split, content in manifest["splits"].items():
        print(f"{split}: {content['rows']:,} chunks of {manifest['k']} tokens, {content['bytes'] / 1e6:,.1f} MB")
    print(f"finished: {paths.chunks}")


def device_of(name: str) -> str:
    """The device to encode on: `auto` is a GPU if there is one."""
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("data.device=cuda, but there is no GPU here: set data.device=cpu or auto.")
    return "cuda" if name != "cpu" and available else "cpu"


if __name__ == "__main__":
    raise SystemExit(command.run(__doc__, Experiment, SECTIONS, prepare, options=OPTIONS))
