"""Checkpoints scored at the same positions of the same text, so that their scores can be compared."""

from collections.abc import Sequence
from dataclasses import replace
from math import lcm
from pathlib import Path
from typing import Any

import torch

from calm_core.autoencoder.model import Autoencoder
from calm_core.checkpoint.folder import Checkpoint, open_checkpoint
from calm_core.config.data_config import DataConfig, Packing
from calm_core.config.experiment import EvaluationConfig
from calm_core.data.chunks import build_chunks
from calm_core.data.dataset import Rows, chunk_rows, token_rows
from calm_core.data.store import ChunkStore, Store, TokenStore
from calm_core.data.tokens import build_tokens
from calm_core.errors import UserError
from calm_core.evaluation.checkpoint import evaluate_checkpoint
from calm_core.inference.load_model import Loaded, experiment_of, find_checkpoint, load_for_inference
from calm_core.tokenizer import Tokenizer


def tokens_of_text(file: Path, tokenizer: Tokenizer, folder: Path) -> TokenStore:
    """The documents of a txt, jsonl or parquet file, tokenized into a store below `folder`."""
    build_tokens(DataConfig(corpus=[str(file)], held_out=0.0), tokenizer, folder / "tokens")
    return TokenStore(folder / "tokens", "train")


def chunks_of_text(
    file: Path, tokenizer: Tokenizer, autoencoder: Autoencoder, folder: Path, packing: Packing = "pack"
) -> ChunkStore:
    """The documents of a file, tokenized and encoded into a store below `folder`."""
    tokens_of_text(file, tokenizer, folder)
    build_chunks(folder / "tokens", autoencoder, folder / "chunks", packing=packing)
    return ChunkStore(folder / "chunks", "train")


def compare(
    paths: Sequence[Path],
    text: Path | None,
    context: int,
    seed: int,
    config: EvaluationConfig,
    device: torch.device,
    scratch: Path,
) -> list[dict[str, Any]]:
    """The evaluation of each checkpoint under one context.

    Args:
        paths: checkpoints `step-N` or run folders; CALM of any K and head, AR.
        text: file to score on; None means the held-out documents of each run, which must then be the same ones. With
            it a checkpoint can be scored whose training data is gone, or never was there: it then has no baselines.
        context: tokens before and at the scored places; 0 means the most that all of them were trained on.
        seed: of the draws.
        config: how much is scored.
        device: where to compute.
        scratch: folder for the stores that the text becomes.

    Raises:
        UserError: naming the checkpoint that cannot be compared, and why.
    """
    checkpoints = [open_checkpoint(find_checkpoint(path)) for path in paths]
    context = common_context(checkpoints, context)
    results: list[dict[str, Any]] = []
    scored_on: dict[str, str] = {}  # what must agree: name -> hash of the first checkpoint
    for number, checkpoint in enumerate(checkpoints):
        loaded = load_for_inference(checkpoint.path, device)
        loaded = replace(loaded, positions=context // loaded.shape.k)
        train, held_out, reason = _stores(checkpoint, loaded, text, scratch / str(number))
        for name, found in _to_agree(loaded, held_out).items():
            if scored_on.setdefault(name, found) != found:
                raise UserError(
                    f"{checkpoint.path} has another {name} than {checkpoints[0].path}: its scores would not compare; "
                    + ("give one text to both by --text." if name == "held-out text" else "evaluate it by itself.")
                )
        about = {"checkpoint": str(checkpoint.path), "k": loaded.shape.k, "head": loaded.shape.head.kind}
        scored_as = {"step": checkpoint.step, "context": context, "baselines_reason": reason}
        results.append({**about, **scored_as, **evaluate_checkpoint(loaded, train, held_out, seed, config)})
    return results


def common_context(checkpoints: Sequence[Checkpoint], context: int) -> int:
    """The tokens of context to score all checkpoints under: `context`, or with 0 the most that suits all of them.

    Raises:
        UserError: `context` is more than one was trained on, or not whole chunks of each.
    """
    ks = [checkpoint.state["identity"]["model"]["k"] for checkpoint in checkpoints]
    trained = [checkpoint.state["identity"]["positions"] * k for checkpoint, k in zip(checkpoints, ks, strict=True)]
    if not context:
        return min(trained) // lcm(*ks) * lcm(*ks) if len(ks) > 1 else trained[0]
    for checkpoint, k, most in zip(checkpoints, ks, trained, strict=True):
        if context > most:
            raise UserError(
                f"--context {context} is more than the {most} tokens that {checkpoint.path} was trained on."
            )
        if context % k:
            raise UserError(
                f"--context {context} is not a multiple of {k}, the tokens of a chunk of {checkpoint.path}."
            )
    return context


def _stores(
    checkpoint: Checkpoint, loaded: Loaded, text: Path | None, scratch: Path
) -> tuple[Store | None, Store, str | None]:
    """What the checkpoint was trained on, for the baselines; what it is scored on; why the first is None, if it is."""
    if text is None:
        rows = _rows(checkpoint, loaded.autoencoder)
        return rows.train.first, rows.held_out, None
    try:
        train, reason = _rows(checkpoint, loaded.autoencoder).train.first, None
    except UserError as missing:
        train, reason = None, f"the training documents are not at hand: {missing}"
    if loaded.autoencoder is None:
        return train, tokens_of_text(text, loaded.tokenizer, scratch), reason
    packing = experiment_of(checkpoint).data.packing
    return train, chunks_of_text(text, loaded.tokenizer, loaded.autoencoder, scratch, packing), reason


def _rows(checkpoint: Checkpoint, autoencoder: Autoencoder | None) -> Rows:
    """The documents of the run that left a checkpoint."""
    experiment = experiment_of(checkpoint)
    if autoencoder is None:
        return token_rows(experiment.data, experiment.paths)
    return chunk_rows(experiment.data, experiment.paths, autoencoder)


def _to_agree(loaded: Loaded, held_out: Store) -> dict[str, Any]:
    """What must be the same where scores are to be compared, by name."""
    tokens = held_out.content_hash if isinstance(held_out, TokenStore) else held_out.manifest["made_from"]["tokens"]
    return {
        "tokenizer": loaded.tokenizer.content_hash,
        "held-out text": tokens,
        "packing of documents": (held_out.packing, held_out.k if held_out.packing == "align" else None),
    }
