"""A frozen autoencoder on disk: `model.safetensors`, and `manifest.json` with its content hash."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from calm_core.autoencoder.model import Autoencoder
from calm_core.config.model_config import AutoencoderConfig
from calm_core.errors import UserError
from calm_core.io import hash_file, replacing
from calm_core.manifest import MANIFEST, format_version, read_manifest, write_manifest

KIND = "autoencoder"

WEIGHTS = "model.safetensors"


def save_autoencoder(model: Autoencoder, folder: Path, tokenizer_hash: str, provenance: dict[str, Any]) -> str:
    """Write the model in float32 and return the content hash of its weights.

    `provenance`, what the model was trained on and how, goes into the manifest as it is. The manifest is written last:
    a folder without one is not an autoencoder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    weights = {name: weight.detach().float().cpu().contiguous() for name, weight in model.state_dict().items()}
    with replacing(folder / WEIGHTS) as temporary:
        save_file(weights, temporary)
    content_hash = hash_file(folder / WEIGHTS)
    manifest = {
        "format_version": format_version(KIND),
        "kind": KIND,
        "k": model.k,
        "vocab_size": model.vocab_size,
        "config": dataclasses.asdict(model.config),
        "tokenizer_hash": tokenizer_hash,
        "content_hash": content_hash,
        "provenance": provenance,
    }
    write_manifest(folder, manifest)
    return content_hash


def load_autoencoder(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Autoencoder:
    """The frozen autoencoder in `folder`, for inference, with its `content_hash` and `tokenizer_hash` set.

    Raises:
        UserError: if the folder has no finished autoencoder, or other weights than the manifest names.
    """
    manifest = read_manifest(folder, KIND)
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path} is missing: train the autoencoder again, or restore the file.")
    if hash_file(path) != manifest["content_hash"]:
        raise UserError(f"{path} is not the file that {folder / MANIFEST} names (content hash differs): restore it.")
    with torch.device("meta"), _SkippedInitialisation():
        model = Autoencoder(AutoencoderConfig(**manifest["config"]), manifest["vocab_size"], manifest["k"])
    model.load_state_dict(load_file(path), assign=True)
    model.content_hash, model.tokenizer_hash = manifest["content_hash"], manifest["tokenizer_hash"]
    return model.to(device, dtype).requires_grad_(False).eval()


class _SkippedInitialisation(TorchFunctionMode):
    """Leave out initial weights: they are about to be loaded, and torch imports its compiler to draw them on "meta"."""

    def __torch_function__(self, function: Callable, _: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)
