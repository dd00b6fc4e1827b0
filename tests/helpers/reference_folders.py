"""Folders as the public reference implementation has them, with the weights of tests/golden."""

import json
from pathlib import Path

import torch
from golden_numbers import GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor

from calm_core.reference.names import HEAD, HEAD_ALIAS
from calm_core.reference.weight_folder import EMBEDDED

CONFIGS = json.loads((GOLDEN / "tiny.config.json").read_text())
WEIGHTS = load_file(GOLDEN / "tiny.weights.safetensors")


def part(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): w for name, w in WEIGHTS.items() if name.startswith(prefix)}


def calm(kind: str, embedded: bool = False) -> dict[str, Tensor]:
    tensors = part("energy.")
    if kind != "energy":
        tensors = {name: w for name, w in tensors.items() if not name.startswith((HEAD, HEAD_ALIAS))} | part(f"{kind}.")
    return tensors | ({EMBEDDED + name: w for name, w in part("ae.").items()} if embedded else {})


def write(folder: Path, config: dict, tensors: dict[str, Tensor], pickled: bool = False, shards: int = 1) -> Path:
    """A folder of the reference; in several shards with the index that names them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    name = "pytorch_model.bin" if pickled else "model.safetensors"
    places = {}
    for shard in range(shards):
        file = name if shards == 1 else name.replace(".", f"-{shard + 1:05}-of-{shards:05}.")
        own = {tensor: tensors[tensor] for tensor in sorted(tensors)[shard::shards]}
        if pickled:
            torch.save(own, folder / file)
        else:
            save_file({tensor: values.clone() for tensor, values in own.items()}, folder / file)
        places |= dict.fromkeys(own, file)
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / f"{name}.index.json").write_text(json.dumps(index))
    return folder
