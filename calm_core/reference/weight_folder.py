"""Weight folders of the public reference implementation: `config.json` and `model.safetensors`.

`pytorch_model.bin` is read too, as tensors and nothing else, and so is either of them in shards that a file
`*.index.json` names; they are written as one file. Two pairs of names mean the same tensors there (see
`names`); a `Form` remembers which of them a folder had, so that it can be written back as it was.
"""

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from calm_core.errors import UserError
from calm_core.io import read_json, replacing, write_text
from calm_core.reference.names import AUTOENCODER_TIED, HEAD, HEAD_ALIAS

CONFIG, WEIGHTS, PICKLED = "config.json", "model.safetensors", "pytorch_model.bin"

INDEX = ".index.json"  # after the name of a file that is in shards

# The autoencoder's weights inside a folder of CALM.
EMBEDDED = "ae_model."

TIED_TO = "encoder.embed_tokens.weight"

# Types that float32 holds exactly.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Form:
    """How a folder held its tensors.

    Attributes:
        config: the values of its `config.json`.
        dtypes: the type, a key of `DTYPES`, of each tensor by its name.
    """

    config: dict[str, Any]
    dtypes: dict[str, str]


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a folder, as they are.

    Raises:
        UserError: a file or a shard is missing or damaged, or holds anything but the tensors it should.
    """
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG} is not a JSON object: give the folder of a released model.")
    for name, read in ((WEIGHTS, load_file), (PICKLED, _unpickle_tensors)):
        if (folder / name).is_file():
            return config, _read(folder / name, read)
        if (folder / f"{name}{INDEX}").is_file():
            return config, _read_shards(folder / f"{name}{INDEX}", read)
    raise UserError(f"{folder} holds neither {WEIGHTS} nor {PICKLED}: give the folder of a released model.")


def write_folder(folder: Path, form: Form, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by their first names, as `resolve` gives them, in a form."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {name: tensors[_first_name(name)].to(DTYPES[dtype]) for name, dtype in form.dtypes.items()}
    with replacing(folder / WEIGHTS) as temporary:
        # Each name gets its own copy: the format does not support shared tensors.
        save_file({name: tensor.clone() for name, tensor in named.items()}, temporary, metadata={"format": "pt"})
    write_text(folder / CONFIG, json.dumps(form.config, indent=1) + "\n")


def resolve(tensors: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder in float32, each under the first of its names.

    Args:
        tensors: as read.
        wanted: the shapes of a model's tensors by their first names.
        folder: named in the error.

    Raises:
        UserError: naming all tensors that are missing, surplus, of another shape or type, or unequal to their alias.
    """
    first: dict[str, Tensor] = {}
    surplus, misshapen, inexact, unequal = [], [], [], []
    for name, tensor in tensors.items():
        own = _first_name(name)
        if own not in wanted:
            surplus.append(name)
        elif tensor.shape != wanted[own]:
            misshapen.append(f"{name} {tuple(tensor.shape)} instead of {tuple(wanted[own])}")
        elif tensor.dtype not in DTYPES.values():
            inexact.append(f"{name} of type {tensor.dtype}")
        elif own in first and not torch.equal(first[own], tensor.float()):
            unequal.append(f"{name} and its other name")
        else:
            first[own] = tensor.float()
    missing = wanted.keys() - {_first_name(name) for name in tensors}
    kinds = {"missing": missing, "surplus": surplus, "misshapen": misshapen, "unreadable": inexact, "unequal": unequal}
    found = [f"{kind}: {', '.join(sorted(names))}" for kind, names in kinds.items() if names]
    if found:
        raise UserError(f"{folder} does not hold the tensors of the model in its {CONFIG} ({'; '.join(found)}).")
    return first


def form_of(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Form:
    """The form of a folder whose tensors `resolve` has accepted."""
    return Form(config, {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()})


def full_form(config: dict[str, Any], first_names: Mapping[str, Tensor]) -> Form:
    """The form for a model that never was in a folder: float32, every tensor under all of its names."""
    names = list(first_names)
    names += [name.removesuffix(TIED_TO) + AUTOENCODER_TIED for name in names if name in (TIED_TO, EMBEDDED + TIED_TO)]
    if f"{HEAD}noise_embd.weight" in first_names:
        names += [HEAD_ALIAS + name.removeprefix(HEAD) for name in first_names if name.startswith(HEAD)]
    return Form(config, dict.fromkeys(names, "float32"))


def _first_name(name: str) -> str:
    """The first of the names that mean the same tensor."""
    if name in (AUTOENCODER_TIED, EMBEDDED + AUTOENCODER_TIED):
        return name.removesuffix(AUTOENCODER_TIED) + TIED_TO
    return HEAD + name.removeprefix(HEAD_ALIAS) if name.startswith(HEAD_ALIAS) else name


def _read(path: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    try:
        return read(path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged, or holds more than tensors: it is refused.") from error


def _read_shards(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all shards; the index says which shard, a file beside it, holds which tensor."""
    content = read_json(index)
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise UserError(f"{index} holds no weight_map, which says the shard of each tensor: get the file again.")
    shards = sorted(set(shard_of.values()))
    if missing := [s for s in shards if Path(s).name != s or not (index.parent / s).is_file()]:
        raise UserError(f"{index.parent} lacks shards that {index.name} names ({', '.join(missing)}): get those too.")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        own = _read(index.parent / shard, read)
        wrong = own.keys() ^ {name for name, place in shard_of.items() if place == shard}
        if wrong:
            raise UserError(
                f"{index.parent / shard} and {index.name} do not agree on {', '.join(sorted(wrong))}: they belong to "
                "two models; get both again."
            )
        tensors |= own
    return tensors


def _unpickle_tensors(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise ValueError("no mapping of names to tensors")
    return dict(content)
