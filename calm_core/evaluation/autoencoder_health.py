"""The health of an autoencoder on documents it has not seen."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calm_core import config
from calm_core.autoencoder.artefact import WEIGHTS
from calm_core.autoencoder.metrics import autoencoder_metrics, noise_curve
from calm_core.autoencoder.model import Autoencoder
from calm_core.config.experiment import Experiment
from calm_core.data.store import TokenStore
from calm_core.errors import UserError
from calm_core.model.noise import stream_seed

FROZEN = "frozen"

SIGMAS = [step / 10 for step in range(11)]


def evaluate_autoencoder(model: Autoencoder, store: TokenStore, chunks: int, seed: int) -> dict[str, Any]:
    """The metrics of an autoencoder on at most `chunks` chunks of a store."""
    return asdict(autoencoder_metrics(model, spread_chunks(model, store, chunks), _generator(model, seed)))


def examine_autoencoder(model: Autoencoder, store: TokenStore, chunks: int, seed: int) -> dict[str, Any]:
    """The metrics of an autoencoder, and its accuracy under noise: `noise_curve`, pairs (sigma, accuracy)."""
    tokens = spread_chunks(model, store, chunks)
    curve = noise_curve(model, tokens, SIGMAS, _generator(model, seed))
    metrics = asdict(autoencoder_metrics(model, tokens, _generator(model, seed)))
    return {"chunks": len(tokens), **metrics, "noise_curve": list(zip(SIGMAS, curve, strict=True))}


def find_autoencoder(path: Path) -> Path | None:
    """The frozen autoencoder at `path`: the folder itself, or `frozen` of a run; None if there is neither."""
    for folder in (path, path / FROZEN):
        if (folder / WEIGHTS).is_file():
            return folder
    return None


def experiment_of_autoencoder(folder: Path) -> Experiment:
    """The experiment that a frozen autoencoder is of, with the current location of its run.

    Raises:
        UserError: if the folder is no longer in its run.
    """
    run = folder.absolute().parent
    if not (run / "config.yaml").is_file():
        raise UserError(f"{folder} does not lie in the run that trained it: give the folder frozen of that run.")
    return replace(config.load(Experiment, run / "config.yaml", []), run=str(run.parent))


def spread_chunks(model: Autoencoder, store: TokenStore, chunks: int) -> Tensor:
    """At most `chunks` chunks `[n, K]` of a store, evenly spread over it, on the model's device."""
    available = len(store) // model.k
    chosen = np.linspace(0, available - 1, min(chunks, available)).astype(np.int64)
    tokens = np.stack([store.read(int(c) * model.k, model.k, ("tokens",))["tokens"] for c in chosen])
    return torch.from_numpy(tokens.astype(np.int64)).to(model.embedding.weight.device)


def _generator(model: Autoencoder, seed: int) -> torch.Generator:
    return torch.Generator(model.embedding.weight.device).manual_seed(stream_seed(seed, "evaluation/autoencoder", 0))
