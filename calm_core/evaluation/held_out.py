"""What a model is scored on: the windows of the held-out text, the positions in them, and the name of the measure."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.config.data_config import Packing
from calm_core.config.experiment import EvaluationConfig
from calm_core.config.training_config import ParallelConfig
from calm_core.data.dataset import Windows
from calm_core.distributed.topology import Topology
from calm_core.errors import UserError
from calm_core.evaluation.brier import MAX_TOKENS
from calm_core.evaluation.ngram import BigramModel

STRIDE = 4  # scored positions begin at token offsets divisible by this: every token is in exactly one group of four

# Scored positions are filled up to a multiple of this, so that tensor-parallel ranks can divide them among themselves
# and the noise of a position is the same in any layout.
MULTIPLE = 8

DRAWN_AT_ONCE = 2048  # draws of a window that are held, and rolled out side by side, at a time

Protocol = Literal["default", "paper"]
"""`paper`: every chunk of a window but the first, scored from two draws each, as the paper reports BrierLM."""


class ScoredPositions(NamedTuple):
    """Scored positions of a window.

    Attributes:
        offsets: the first token that is predicted at each, counted from the window's first, `[P]`.
        counted: False for the last one repeated, which only fills up the number, `[P]` bool.
        k: tokens per chunk.
    """

    offsets: Tensor
    counted: Tensor
    k: int

    @property
    def positions(self) -> Tensor:
        """The position whose hidden state predicts the chunk of the first predicted token, `[P]`."""
        return self.offsets // self.k - 1

    @property
    def known(self) -> Tensor:
        """How many tokens of that chunk precede the first predicted token, `[P]`: 0 where it begins the chunk."""
        return self.offsets % self.k


def scored_offsets(positions: int, k: int, limit: int = 0, protocol: Protocol = "default") -> Tensor:
    """The token offsets of a window at which four tokens are predicted, `[P]`.

    They are divisible by `STRIDE`, with at least half the window before them and four tokens of the window from there
    on, so that a model that is rolled out stays in the context that it was trained on. They depend on the number of
    tokens alone and not on K. Under the paper's protocol every chunk but the first begins one.

    Args:
        positions: S of the window.
        k: K.
        limit: the most positions to score, evenly spread; 0 means all.
        protocol: which positions are scored.

    Raises:
        UserError: the window is too short to hold one.
    """
    tokens = positions * k
    if protocol == "paper":
        return torch.arange(k, max(tokens - MAX_TOKENS + 1, k), k)
    offsets = torch.arange(0, max(tokens - MAX_TOKENS + 1, 0), STRIDE)
    offsets = offsets[(2 * offsets >= tokens) & (offsets >= k)]
    if not len(offsets):
        raise UserError(
            f"A window of {positions} positions of {k} tokens has no position to score, which is a token offset "
            f"divisible by {STRIDE} with half the window before it: raise training.positions."
        )
    count = min(limit or len(offsets), len(offsets))
    return offsets[torch.linspace(0, len(offsets) - 1, count, dtype=torch.float64).long()]


def measure(context: int, k: int, packing: Packing = "pack", protocol: Protocol = "default") -> str:
    """The name of BrierLM under a context of this many tokens: scores of other names are not comparable.

    Documents that are padded to whole chunks make windows that begin at other tokens for every K.
    """
    aligned = f"/align{k}" if packing == "align" else ""
    how = f"paper/ctx{context}" if protocol == "paper" else f"ctx{context}/stride{STRIDE}"
    return f"brier_lm@{how}{aligned}"


@dataclass(frozen=True)
class HeldOut:
    """What a model is scored on, and how.

    Attributes:
        windows: of the held-out split.
        autoencoder: turns sampled latents into tokens; None where the head samples tokens itself.
        counts: of each token in the training split `[V]`, for the unigram baseline; None: there is none.
        seed: of the evaluation's noise.
        config: how much of it.
        bigram: the bigram baseline; None: there is none.
        diagnostics: whether the conditioning of the head is examined too.
        protocol: which positions are scored, and from how many draws.
    """

    windows: Windows
    autoencoder: Autoencoder | None
    counts: np.ndarray | None
    seed: int
    config: EvaluationConfig
    bigram: BigramModel | None = None
    diagnostics: bool = False
    protocol: Protocol = "default"

    @property
    def draws(self) -> int:
        """N, the draws at each scored position."""
        return 2 if self.protocol == "paper" else self.config.samples

    @property
    def offsets(self) -> Tensor:
        """The scored token offsets of each window `[P]`."""
        k = self.windows.store.k
        return scored_offsets(self.windows.positions, k, self.config.places, self.protocol)

    @property
    def rollout_chunks(self) -> int:
        """How many chunks are drawn one after the other, so that each draw has the four predicted tokens."""
        k = self.windows.store.k
        return int((-(-(self.offsets % k + MAX_TOKENS) // k)).max())

    def groups(self, ranks: int) -> Iterator[ScoredPositions]:
        """The scored positions in groups that are drawn from together, for this many tensor-parallel ranks."""
        multiple = lcm(MULTIPLE, ranks)
        size = max(1, DRAWN_AT_ONCE // (self.draws * multiple)) * multiple
        for offsets in self.offsets.split(size):
            missing = -len(offsets) % multiple
            counted = torch.arange(len(offsets) + missing) < len(offsets)
            yield ScoredPositions(torch.cat([offsets, offsets[-1:].expand(missing)]), counted, self.windows.store.k)

    def micro_batches(self, topology: Topology) -> list[np.ndarray]:
        """The windows that this data-parallel rank scores, a micro-batch at a time; every rank has the same number.

        `config.windows` of them (0: all) are spread over the split, so that a subset sees as many documents as it can.
        Without pipeline stages they are the same for any number of ranks; micro-batches differ in size by one at
        most, and have one window too many at most.

        Raises:
            UserError: if the held-out split is too small to give every rank one.
        """
        ranks, size = topology.data_size, self.config.micro_batch
        chosen = _chosen(len(self.windows), self.count(topology.layout, topology.world))
        parts = min(-(-len(chosen) // (ranks * size)), len(chosen) // ranks) * ranks
        return np.array_split(chosen, parts)[topology.data_rank :: ranks]

    def count(self, layout: ParallelConfig, world: int) -> int:
        """The windows that a world of ranks in a layout scores; see `micro_batches`.

        With pipeline stages it is rounded down to whole micro-batches on every rank.

        Raises:
            UserError: if the held-out split is too small to give every rank one micro-batch.
        """
        ranks, size, available = layout.data_parallel(world), self.config.micro_batch, len(self.windows)
        count = min(self.config.windows or available, available)
        if layout.pipeline == 1:
            if available < ranks:
                raise UserError(
                    f"the held-out split has {available} windows, fewer than the {ranks} data-parallel ranks that "
                    "share them: raise data.held_out or start fewer ranks."
                )
            return max(count, ranks)
        together = size * ranks * layout.micro_batch_multiple
        count = max(count // together, 1) * together
        if count > available:
            raise UserError(
                f"the held-out split has {available} windows, fewer than the {together} that one pass of all ranks "
                f"takes (evaluation.micro_batch={size}): lower evaluation.micro_batch or raise data.held_out."
            )
        return count

    def description(self) -> dict[str, Any]:
        """What is measured: the name of BrierLM, scored positions of a window, draws at each, chunks of a draw.

        `known_tokens` lists how many tokens of a chunk are known where a scored position begins inside it.
        """
        k, packing = self.windows.store.k, self.windows.store.packing
        return {
            "measure": measure(self.windows.positions * k, k, packing, self.protocol),
            "places_per_window": len(self.offsets),
            "known_tokens": (self.offsets % k).unique().tolist(),
            "samples": self.draws,
            "rollout_chunks": self.rollout_chunks,
        }


def _chosen(available: int, count: int) -> np.ndarray:
    """The numbers of `count` of the windows, evenly spread over the split."""
    return np.linspace(0, available - 1, count).astype(np.int64)
