"""The health of an autoencoder: how well it reconstructs its chunks, and statistics of its latent space."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calm_core import config
from calm_core.autoencoder.model import WEIGHTS, Autoencoder, kl_divergence
from calm_core.config.experiment import Experiment
from calm_core.data.store import TokenStore
from calm_core.errors import UserError
from calm_core.model.noise import stream_seed
from calm_core.model.output_layer import mean_cross_entropy

FROZEN = "frozen"

SIGMAS = [step / 10 for step in range(11)]


@dataclass(frozen=True)
class AutoencoderMetrics:
    """Fractions of tokens reconstructed, and statistics of the latent dimensions, over a set of chunks."""

    token_accuracy: float  # decoding the posterior mean
    token_accuracy_posterior: float  # decoding a draw of the posterior
    token_accuracy_noisy: float  # decoding the mean plus normal noise of standard deviation `sigma`
    sigma: float
    cross_entropy: float  # nats per token of the whole vocabulary, decoding the draw of the posterior
    position_accuracy: list[float]  # of the mean, for each of the K positions in the chunk
    mean_sigma: float  # mean standard deviation of the posterior
    dimension_sigma: list[float]  # likewise for each of the l dimensions
    kl: list[float]  # nats, for each of the l dimensions
    dead_dimensions: int  # whose posterior mean hardly varies with the tokens


@torch.no_grad()
def autoencoder_metrics(
    model: Autoencoder,
    tokens: Tensor,
    generator: torch.Generator | None = None,
    sigma: float = 0.3,
    batch: int = 1024,
) -> AutoencoderMetrics:
    """Evaluate the model on chunks `tokens [n, K]`, `batch` of them at a time.

    A dimension is dead when the variance of its posterior mean over the chunks is below 0.01, the usual bound for an
    inactive unit of a variational autoencoder (Burda et al., 2015).
    """
    means, log_stds, nats, hits = [], [], 0.0, torch.zeros(3, model.k, dtype=torch.float64)
    for chunk in tokens.split(batch):
        mean, log_std = (part.float() for part in model.encode(chunk))
        draw = torch.randn(2, *mean.shape, generator=generator, device=mean.device)
        latents = torch.stack([mean, mean + log_std.exp() * draw[0], mean + sigma * draw[1]])
        hits += (model.decode_tokens(latents) == chunk).sum(1).cpu()
        hidden = model.decode_hidden(latents[1]).flatten(0, -2)
        nats += mean_cross_entropy(hidden, model.embedding.weight, chunk.flatten()).item() * len(chunk)
        means.append(mean)
        log_stds.append(log_std)
    mean, log_std = torch.cat(means), torch.cat(log_stds)
    accuracy = hits / len(tokens)  # [mean | posterior | noisy, K]
    clean, posterior, noisy = accuracy.mean(1).tolist()
    return AutoencoderMetrics(
        token_accuracy=clean,
        token_accuracy_posterior=posterior,
        token_accuracy_noisy=noisy,
        sigma=sigma,
        cross_entropy=nats / len(tokens),
        position_accuracy=accuracy[0].tolist(),
        mean_sigma=log_std.exp().mean().item(),
        dimension_sigma=log_std.exp().mean(0).tolist(),
        kl=kl_divergence(mean, log_std).mean(0).tolist(),
        dead_dimensions=int((mean.var(0, correction=0) < 0.01).sum()),
    )


@torch.no_grad()
def noise_curve(
    model: Autoencoder, tokens: Tensor, sigmas: list[float], generator: torch.Generator, batch: int = 1024
) -> list[float]:
    """Fraction of the tokens of chunks `[n, K]` reconstructed from the mean plus noise, by its standard deviation."""
    hits = torch.zeros(len(sigmas), dtype=torch.float64)
    for chunk in tokens.split(batch):
        mean = model.encode(chunk)[0].float()
        draw = torch.randn(mean.shape, generator=generator, device=mean.device)
        for index, sigma in enumerate(sigmas):
            hits[index] += (model.decode_tokens(mean + sigma * draw) == chunk).sum().item()
    return (hits / tokens.numel()).tolist()


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
    """The experiment that a frozen autoencoder belongs to, with the current location of its run.

    Raises:
        UserError: if the folder is no longer in its run.
    """
    run = folder.absolute().parent
    if not (run / "config.yaml").is_file():
        raise UserError(f"{folder} is not in the run that trained it: give the folder frozen of that run.")
    return replace(config.load(Experiment, run / "config.yaml", []), run=str(run.parent))


def spread_chunks(model: Autoencoder, store: TokenStore, chunks: int) -> Tensor:
    """At most `chunks` chunks `[n, K]` of a store, evenly spread over it, on the model's device."""
    available = len(store) // model.k
    chosen = np.linspace(0, available - 1, min(chunks, available)).astype(np.int64)
    tokens = np.stack([store.read(int(c) * model.k, model.k, ("tokens",))["tokens"] for c in chosen])
    return torch.from_numpy(tokens.astype(np.int64)).to(model.embedding.weight.device)


def _generator(model: Autoencoder, seed: int) -> torch.Generator:
    return torch.Generator(model.embedding.weight.device).manual_seed(stream_seed(seed, "evaluation/autoencoder", 0))
