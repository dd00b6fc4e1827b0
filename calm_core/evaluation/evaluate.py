"""The one way in which a model is evaluated, in training and from a checkpoint, in any layout of ranks."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from calm_core.data.dataset import needed_columns, read_batch
from calm_core.distributed.collectives import from_last_stage
from calm_core.distributed.schedule import Pass, forward_only
from calm_core.distributed.topology import Topology
from calm_core.evaluation.brier import MAX_TOKENS, BrierAccumulator, ClusteredMean, brier_lm, interval_factor
from calm_core.evaluation.held_out import HeldOut, ScoredPositions
from calm_core.evaluation.scores import (
    Draws,
    ReadBatch,
    draw_scores,
    first_draws,
    next_draws,
    position_scores,
    read,
    tokens_of,
)
from calm_core.megatron import parallel_state
from calm_core.model.attention import BranchingCache
from calm_core.model.calm import CalmModel
from calm_core.model.layers import own_positions
from calm_core.model.noise import SampleNoise

OnProgress = Callable[[int], object]
"""`progress(windows)`: this many more windows are scored."""

ClusteredScores = tuple[tuple[str, ...], tuple[Tensor, Tensor, Tensor]]
"""Names of the scores, and the state of a `BrierAccumulator` over them: what ranks exchange."""

BLOCKS_PER_WINDOW = 8  # half of them are scored


@torch.no_grad()
def evaluate(
    model_parts: Sequence[CalmModel],
    topology: Topology,
    held_out: HeldOut,
    stop: Callable[[], bool] | None = None,
    progress: OnProgress = lambda windows: None,
) -> dict[str, Any] | None:
    """Score a model on held-out windows, divided among the data-parallel ranks. Collective.

    Args:
        model_parts: what this rank holds of the model; in evaluation mode during the call.
        topology: the layout.
        held_out: what the model is scored on.
        stop: asked on every rank between micro-batches whether to stop; its answer must be the same on all ranks.
        progress: called with the number of windows that this rank has just scored.

    Returns:
        On every rank: what was measured, and the mean and standard error of each score, as `summarize` names them; None
        if the evaluation was stopped.
    """
    windows, stages = held_out.micro_batches(topology), topology.layout.pipeline
    modes = [part.training for part in model_parts]
    found: list[ClusteredScores] = []
    for part in model_parts:
        part.eval()
    try:
        # One micro-batch for each pipeline stage to work on at a time, since roll-outs keep keys and values.
        for start in range(0, len(windows), stages):
            if stop is not None and stop():
                return None
            chosen = windows[start : start + stages]
            found += _score(model_parts, topology, held_out, chosen)
            progress(sum(map(len, chosen)))
    finally:
        for part, mode in zip(model_parts, modes, strict=True):
            part.train(mode)
    count = held_out.count(topology.layout, topology.world)
    return {"windows": count, **held_out.description(), **summarize(_gathered(found, topology))}


def _score(
    model_parts: Sequence[CalmModel], topology: Topology, held_out: HeldOut, windows: Sequence[np.ndarray]
) -> list[ClusteredScores]:
    """The scores of one micro-batch for each pipeline stage, on the last stage; [] on the others."""
    columns = needed_columns(held_out.windows.store, first=topology.first, last=topology.last)
    batches = [read_batch(held_out.windows, chosen, chosen, columns) for chosen in windows]
    inputs = [batch.inputs(topology.device) if topology.first else None for batch in batches]
    forward = _Forward(model_parts, topology, len(windows[0]), held_out.rollout_chunks > 1)
    hidden = forward(inputs, held_out.windows.positions)
    read_batches = [read(model_parts[-1], held_out, *pair) for pair in zip(batches, hidden, strict=False)]
    everywhere = [position_scores(batch) for batch in read_batches]
    found = []
    for number, scored in enumerate(held_out.groups(topology.layout.tensor)):
        draws = _draw(forward, topology, held_out, read_batches, scored, number)
        for batch, losses, drawn in zip(read_batches, everywhere, draws, strict=True):
            scores = {name: batch.at(values, scored.positions) for name, values in losses.items()}
            found.append(clustered(draw_scores(batch, scored, drawn) | scores, batch, scored))
    return found


def _draw(
    forward: "_Forward",
    topology: Topology,
    held_out: HeldOut,
    read_batches: Sequence[ReadBatch],
    scored: ScoredPositions,
    number: int,
) -> list[Draws]:
    """The draws at a group of scored positions, of each micro-batch on the last stage: first chunks, then roll-outs."""
    k, n, autoencoder = scored.k, held_out.draws, held_out.autoencoder
    noises, draws = [], []
    for batch in read_batches:
        noise = batch.noise
        noises.append(SampleNoise(noise.seed, noise.samples, noise.device, _purpose(noise.purpose, number)))
        text = batch.tokens((scored.positions + 1) * k, k).to(topology.device)
        hidden = batch.at(batch.hidden, scored.positions)
        draws.append(first_draws(batch.model, autoencoder, noises[-1], hidden, scored, text, n))
    branches = scored.positions.repeat_interleave(n).to(topology.device)
    forward.branch(branches)
    for _ in range(1, held_out.rollout_chunks):
        last = [drawn.last_chunks(batch.model) for drawn, batch in zip(draws, read_batches, strict=True)]
        shape = (forward.count, forward.micro_batch, len(branches), k)
        inputs = from_last_stage(torch.stack(last) if last else None, shape, topology.device)
        hidden = forward(inputs, len(branches))
        draws = [
            next_draws(batch.model, autoencoder, noise, states, drawn)
            for batch, noise, states, drawn in zip(read_batches, noises, hidden, draws, strict=True)
        ]
    return draws


def _purpose(purpose: str, group: int) -> str:
    """The name of the noise of a group of scored positions; the first group has the plain one."""
    return f"{purpose}/group-{group}" if group else purpose


class _Forward:
    """Forward passes of a few micro-batches through all pipeline stages, with caches where they are rolled out."""

    def __init__(self, model_parts: Sequence[CalmModel], topology: Topology, micro_batch: int, rolls_out: bool) -> None:
        self.micro_batch, self.count = micro_batch, 0
        self._parts, self._topology = model_parts, topology
        # Of each model part and micro-batch.
        self._caches: dict[tuple[int | None, int], BranchingCache | None] = defaultdict(
            BranchingCache if rolls_out else lambda: None
        )

    def __call__(self, inputs: Sequence[Tensor | None], positions: int) -> list[Tensor]:
        """Hidden states `[S', B, d]` of the chunks `[B, S, K]` of each micro-batch, on the last stage; else []."""
        self.count = len(inputs)

        def step(numbers: Iterator[int], model: CalmModel) -> tuple[Tensor, Any]:
            number = next(numbers)
            hidden = model.hidden(inputs[number] if model.first else None, self._caches[model.vp_stage, number])
            return hidden, lambda hidden, non_loss_data: hidden

        return forward_only(self._parts, step, range(len(inputs)), Pass(positions, self.micro_batch))

    def branch(self, starts: Tensor) -> None:
        """Continue the windows as branches after these positions, `[R]`, and forget earlier branches."""
        for cache in self._caches.values():
            if cache is not None:
                cache.branch(starts)


def _gathered(found: list[ClusteredScores], topology: Topology) -> list[ClusteredScores]:
    """What all ranks have scored, on every rank."""
    # Without sequence parallelism tensor-parallel ranks score the same positions: one of them counts.
    counts = topology.layout.sequence or parallel_state.get_tensor_model_parallel_rank() == 0
    gathered: list[list[ClusteredScores]] = [[] for _ in range(topology.world)]
    dist.all_gather_object(gathered, found if counts else [])
    return [part for rank in gathered for part in rank]


def clustered(scores: dict[str, Tensor], read: ReadBatch, scored: ScoredPositions) -> ClusteredScores:
    """Scores `[P', B]` summed by the document that each target chunk begins in, and by short blocks of positions."""
    windows, config = read.held_out.windows, read.model.config
    text = read.text(scored)
    counted = torch.stack([text[..., tokens_of(name) - 1] for name in scores], -1)
    documents = torch.from_numpy(windows.document_ids(read.batch.samples)).T[scored.positions + 1]
    block = scored.offsets * BLOCKS_PER_WINDOW // (windows.positions * scored.k)
    blocks = block.unsqueeze(1) + torch.from_numpy(read.batch.samples) * BLOCKS_PER_WINDOW
    values = torch.stack([score.cpu().double() for score in scores.values()], -1)
    own = own_positions(scored.counted, config)
    documents, counted, blocks = (own_positions(x, config)[own].flatten(0, 1) for x in (documents, counted, blocks))
    accumulator = BrierAccumulator(len(scores))
    accumulator.add(values[own].flatten(0, 1), documents, counted, blocks)
    return tuple(scores), accumulator.state()


def summarize(parts: Iterable[ClusteredScores]) -> dict[str, Any]:
    """Each score's mean under its name and its standard error, clustered by document, under `name_error`; BrierLM,
    also of the bigram table if it was scored.

    `brier_lm` is None with a `brier_lm_reason` unless Brier-1..4 are all significant. A single document is divided into
    blocks of positions; an error is also None where there is a single block. `standard_errors` says what they are
    computed over, and how many of them a 95 % interval extends to either side. Of the variance of a scored position's
    Brier-n, `variance_within_n` is due to the draws and falls with their number, `variance_between_n` to the position
    and falls only with the number of positions.
    """
    parts = list(parts)
    names = parts[0][0]
    total = BrierAccumulator(len(names))
    for _, state in parts:
        total.merge(state)
    result = total.result()
    errors = [None if math.isnan(error) else error for error in result.standard_error.tolist()]
    named: dict[str, Any] = {}
    for name, mean, error in zip(names, result.mean.tolist(), errors, strict=True):
        named[name], named[f"{name}_error"] = mean, error
    _split_variances(named, result.positions)
    for whose in ("", *({"bigram_"} if "bigram_brier_1" in named else ())):
        own = [index for index, name in enumerate(names) if name.startswith(f"{whose}brier_")]
        four = ClusteredMean(result.mean[own], result.covariance[own][:, own], result.positions, result.clusters)
        lm = brier_lm(four)
        name = f"{whose}brier_lm"
        named |= {name: lm.value, f"{name}_error": lm.standard_error, f"{name}_reason": lm.reason}
    factor = interval_factor(result.clusters) if result.clusters > 1 else None
    errors_of = {"clusters": result.clusters, "of": result.unit, "interval_factor": factor}
    return named | {
        "scored_positions": result.positions,
        "documents": result.documents,
        "standard_errors": errors_of,
    }


def _split_variances(named: dict[str, Any], positions: int) -> None:
    """Replace the mean squares of Brier-n by the variance that the positions account for."""
    for n in (n for n in range(1, MAX_TOKENS + 1) if f"square_{n}" in named):
        del named[f"square_{n}_error"], named[f"variance_within_{n}_error"]
        variance = (named.pop(f"square_{n}") - named[f"brier_{n}"] ** 2) * positions / max(positions - 1, 1)
        named[f"variance_between_{n}"] = variance - named[f"variance_within_{n}"]
