"""Evaluation during training: held-out windows shared by the ranks, through the engine's own schedule."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from calm_core.data.dataset import needed_columns, read_batch
from calm_core.distributed.collectives import from_last_stage
from calm_core.distributed.engine import Engine, Pass
from calm_core.distributed.topology import Topology
from calm_core.errors import UserError
from calm_core.evaluation.scores import (
    ClusteredScores,
    HeldOut,
    ScoredBatch,
    branching_cache,
    chunks_to_draw,
    clustered,
    scored_batch,
    scores,
    summarize,
)
from calm_core.model.cache import BranchingCache
from calm_core.model.calm import CalmModel


@torch.no_grad()
def evaluate(engine: Engine, held_out: HeldOut, stop: Callable[[], bool] | None = None) -> dict[str, Any] | None:
    """Score a model on held-out windows, shared by the data-parallel ranks. Collective.

    Args:
        engine: holds the model.
        held_out: what it is scored on.
        stop: asked on every rank between micro-batches whether to stop; its answer must be the same on all ranks.

    Returns:
        On every rank: what was measured, the mean of each score (Brier-1.., collision, unigram baseline, loss) and its
        standard error, and BrierLM, as `summarize` names them; None if the evaluation was stopped.
    """
    # One micro-batch for each pipeline stage to work on at a time, since roll-outs keep their keys and values.
    windows, together = own_windows(held_out, engine.topology), engine.topology.layout.pipeline
    parts: list[ClusteredScores] = []
    for model_part in engine.model_parts:
        model_part.eval()
    try:
        for start in range(0, len(windows), together):
            if stop is not None and stop():
                return None
            parts += _Group(engine, held_out, windows[start : start + together]).scores()
    finally:
        for model_part in engine.model_parts:
            model_part.train()
    return {**held_out.description(), **summarize(_gathered(parts, engine))}


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


class _Group:
    """Micro-batches of windows that go through the pipeline's stages together: read once, then rolled out."""

    def __init__(self, engine: Engine, held_out: HeldOut, windows: Sequence[np.ndarray]) -> None:
        self._engine, self._held_out, self._device = engine, held_out, engine.topology.device
        columns = needed_columns(held_out.windows.store, first=engine.topology.first, last=engine.topology.last)
        self._batches = [read_batch(held_out.windows, chosen, chosen, columns) for chosen in windows]
        self._scored: list[ScoredBatch] = []  # on the last stage
        self._k = held_out.windows.store.k
        # Of each model chunk and micro-batch.
        self._caches: dict[tuple[int | None, int], BranchingCache | None] = defaultdict(
            lambda: branching_cache(self._k)
        )

    def scores(self) -> list[ClusteredScores]:
        """Of each micro-batch, on the last stage."""
        self._pass(self._read, self._held_out.windows.positions)
        branches = self._held_out.branches(self._engine.topology.layout.tensor).to(self._device)
        for cache in self._caches.values():
            if cache is not None:
                cache.branch(branches)
        shape = (len(self._batches), self._held_out.config.micro_batch, len(branches), self._k)
        for _ in range(1, chunks_to_draw(self._k)):
            said = torch.stack([scored.draws.said for scored in self._scored]) if self._scored else None
            self._said = from_last_stage(said, shape, self._device)
            self._pass(self._continue, len(branches))
        return [clustered(scores(scored), scored) for scored in self._scored]

    def _pass(self, step: Callable[..., Any], positions: int) -> None:
        shape = Pass(positions, self._held_out.config.micro_batch)
        self._engine.evaluate(step, range(len(self._batches)), shape)

    def _read(self, numbers: Iterator[int], model: CalmModel) -> tuple[Tensor, Any]:
        """The windows, and their first draws."""
        number = next(numbers)
        batch = self._batches[number]

        def begin(hidden: Tensor, non_loss_data: bool) -> None:
            self._scored.append(scored_batch(model, hidden, batch, self._held_out))

        inputs = batch.inputs(self._device) if model.first else None
        return model.hidden(inputs, self._caches[model.vp_stage, number]), begin

    def _continue(self, numbers: Iterator[int], model: CalmModel) -> tuple[Tensor, Any]:
        """What the draws have said, and what they say next."""
        number = next(numbers)

        def advance(hidden: Tensor, non_loss_data: bool) -> None:
            self._scored[number].draws.advance(hidden)

        return model.hidden(self._said[number] if model.first else None, self._caches[model.vp_stage, number]), advance


def _gathered(parts: list[ClusteredScores], engine: Engine) -> list[ClusteredScores]:
    """What all ranks have scored, made known to every rank."""
    # Without sequence parallelism tensor-parallel ranks score the same positions: one of them counts.
    counts = engine.topology.layout.sequence or parallel_state.get_tensor_model_parallel_rank() == 0
    gathered: list[list[ClusteredScores]] = [[] for _ in range(engine.topology.world)]
    dist.all_gather_object(gathered, parts if counts else [])
    return [part for rank in gathered for part in rank]
