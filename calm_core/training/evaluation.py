"""Evaluation during training: held-out windows shared by the ranks, through the engine's own schedule."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from calm_core.errors import UserError
from calm_core.evaluation.scores import ClusteredScores, HeldOut, clustered, scored_batch, scores, summarize
from calm_core.model.calm import CalmModel
from calm_core.parallel.engine import Engine, Pass
from calm_core.parallel.topology import Topology
from calm_core.training.chunk_batch import needed_columns, read_batch


def evaluate(engine: Engine, held_out: HeldOut) -> dict[str, Any]:
    """Score a model on held-out windows, shared by the data-parallel ranks. Collective.

    Returns:
        On every rank: the mean of each score (Brier-1.., collision, unigram baseline, loss) and its standard error,
        and BrierLM, as `summarize` names them.
    """
    windows = own_windows(held_out, engine.topology)
    for chunk in engine.chunks:
        chunk.eval()
    topology = engine.topology
    columns = needed_columns(held_out.windows.store, first=topology.first, last=topology.last)
    step = partial(_forward_step, held_out=held_out, columns=columns, device=topology.device)
    shape = Pass(held_out.windows.positions, held_out.config.micro_batch)
    parts = engine.evaluate(step, windows, shape)
    for chunk in engine.chunks:
        chunk.train()
    return summarize(_gathered(parts, engine))


def own_windows(held_out: HeldOut, topology: Topology) -> list[np.ndarray]:
    """This data-parallel rank's micro-batches of window indices; every rank has as many.

    Raises:
        UserError: if the held-out split is too small to give every rank one.
    """
    config, ranks = held_out.config, topology.data_size
    together = config.micro_batch * ranks * topology.layout.micro_batch_multiple
    available = len(held_out.windows)
    wanted = min(config.windows or available, available)
    count = max(wanted // together, 1) * together
    if count > available:
        raise UserError(
            f"the held-out split has {available} windows, fewer than the {together} that one pass of all ranks takes "
            f"(evaluation.micro_batch={config.micro_batch}): lower evaluation.micro_batch or raise data.held_out."
        )
    # Spread over the split, so that a subset sees as many documents as it can.
    chosen = np.linspace(0, available - 1, count).astype(np.int64)
    own = chosen.reshape(-1, ranks, config.micro_batch)[:, topology.data_rank]
    return list(own)


def _forward_step(
    micro_batches: Iterator[np.ndarray], model: CalmModel, held_out: HeldOut, columns: list[str], device: torch.device
) -> tuple[Tensor, Any]:
    chosen = next(micro_batches)
    batch = read_batch(held_out.windows, chosen, chosen, columns)

    def score(hidden: Tensor, non_loss_data: bool) -> ClusteredScores:
        scored = scored_batch(model, hidden, batch, held_out)
        return clustered(scores(scored), scored)

    return model.hidden(batch.inputs(device) if model.first else None), score


def _gathered(parts: list[ClusteredScores], engine: Engine) -> list[ClusteredScores]:
    """What all ranks have scored, made known to every rank."""
    # Without sequence parallelism tensor-parallel ranks score the same positions: one of them counts.
    counts = engine.topology.layout.sequence or parallel_state.get_tensor_model_parallel_rank() == 0
    gathered: list[list[ClusteredScores]] = [[] for _ in range(engine.topology.world)]
    dist.all_gather_object(gathered, parts if counts else [])
    return [part for rank in gathered for part in rank]
