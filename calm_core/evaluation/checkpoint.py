"""The full evaluation of a checkpoint: all held-out windows, baselines, and diagnostics of its conditioning."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from calm_core.config.experiment import EvaluationConfig
from calm_core.data.dataset import Windows
from calm_core.data.store import Store
from calm_core.distributed.topology import Topology
from calm_core.evaluation.evaluate import evaluate
from calm_core.evaluation.held_out import HeldOut, Protocol
from calm_core.evaluation.ngram import BigramModel
from calm_core.evaluation.scores import BASELINES
from calm_core.inference.load_model import Loaded
from calm_core.progress import Progress

BIGRAM_CHUNKS = 1 << 22  # of the training split that the bigram baseline is counted on: all of a small corpus


def evaluate_checkpoint(
    loaded: Loaded,
    topology: Topology,
    train: Store | None,
    held_out: Store,
    seed: int,
    config: EvaluationConfig,
    protocol: Protocol = "default",
) -> dict[str, Any]:
    """Score a model on `config.windows` windows of a store (0: all), evenly spread over it. Collective.

    The record has the bigram baseline and the diagnostics of the head in addition to that of an evaluation in training.
    The baselines are those of the tokens in `train`, and None without. With `protocol="paper"` the record has one more,
    `paper`: Brier-n and BrierLM as the paper counts them.
    """
    counts, bigram = (None, None) if train is None else (train.token_counts(), _bigram_model(train))
    windows = Windows(held_out, loaded.positions)
    own = HeldOut(windows, loaded.autoencoder, counts, seed, config, bigram, diagnostics=True)
    passes = [own]
    if protocol == "paper":
        passes.append(replace(own, counts=None, bigram=None, diagnostics=False, protocol="paper"))
    total = sum(map(len, own.micro_batches(topology))) * len(passes)
    with Progress("evaluating", total, "windows") as progress:
        result, *paper = [evaluate([loaded.model], topology, what, progress=progress.advance) for what in passes]
    return {**dict.fromkeys(BASELINES), **result, **({"paper": paper[0]} if paper else {})}


def _bigram_model(train: Store) -> BigramModel:
    tokens = train.read(0, min(len(train), BIGRAM_CHUNKS), ("tokens",))["tokens"]
    return BigramModel(torch.from_numpy(tokens.reshape(-1).astype(np.int64)), train.vocab_size)
