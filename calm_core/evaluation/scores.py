"""Scores of a micro-batch of held-out windows at the scored positions, and their means over documents."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from math import lcm
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.config.data_config import Packing
from calm_core.config.experiment import STRIDE, EvaluationConfig
from calm_core.data.chunks import text_tokens
from calm_core.data.dataset import ChunkBatch, Windows
from calm_core.errors import UserError
from calm_core.evaluation.brier import (
    MAX_TOKENS,
    BrierAccumulator,
    BrierTerms,
    ClusteredMean,
    autoregressive_brier_terms,
    autoregressive_within_variance,
    brier_lm,
    brier_terms,
    within_variance,
)
from calm_core.evaluation.ngram import unigram_brier_terms
from calm_core.model.cache import BranchingCache
from calm_core.model.calm import CalmModel
from calm_core.model.heads.protocol import Target
from calm_core.model.layers import gathered_positions, own_positions
from calm_core.model.noise import SampleNoise


def scored_positions(positions: int, k: int, places: int = 0) -> Tensor:
    """Positions p of a window `[P]` that are scored: by their target, chunk p + 1, and the tokens that follow.

    The target begins at a token offset divisible by `STRIDE`, with at least half the window before it and four
    tokens of the window from there on: so whatever K is, the true next tokens are in the window, and a model that rolls
    out to foretell them stays in the context that it was trained on.

    Args:
        positions: S of the window.
        k: K.
        places: at most so many, evenly spread; 0 means all. The same choice for every K that divides 8.

    Raises:
        UserError: the window is too short to hold one.
    """
    offsets = torch.arange(1, positions) * k
    in_second_half = (2 * offsets >= positions * k) & (offsets + MAX_TOKENS <= positions * k)
    found = (in_second_half & (offsets % STRIDE == 0)).nonzero().flatten()
    if not len(found):
        raise UserError(
            f"A window of {positions} positions of {k} tokens has no place to score, which is a token offset divisible "
            f"by {STRIDE} with half the window before it: raise training.positions."
        )
    count = min(places or len(found), len(found))
    return found[torch.linspace(0, len(found) - 1, count, dtype=torch.float64).long()]


def measure(context: int, k: int, packing: Packing = "pack") -> str:
    """The name of BrierLM under a context of so many tokens: scores of other names are not comparable.

    Documents that are padded to whole chunks make windows that begin at other tokens for every K.
    """
    aligned = f"/align{k}" if packing == "align" else ""
    return f"brier_lm@ctx{context}/stride{math.lcm(STRIDE, k)}{aligned}"


def chunks_to_draw(k: int) -> int:
    """How many chunks of K tokens foretell the four tokens of BrierLM."""
    return -(-MAX_TOKENS // k)


class Draws:
    """N draws of the next tokens at each of P places of B windows: one chunk, or as many as four tokens take.

    All draws of all places go on together, as branches of the windows in a cache. The first K tokens of a roll-out are
    what one chunk would have been: all Brier-n of a model rest on the same draws.

    Attributes:
        latents: of the first chunk `[P', B, N, l]` of this rank's P' places; its token where the head says tokens.
        said: the last chunk of every branch, `[B, P N, K]`: the model's next input.
    """

    def __init__(self, model: CalmModel, autoencoder: Autoencoder | None, noise: SampleNoise, hidden: Tensor, n: int):
        """Draw the first chunks from hidden states `[P', B, d]`; `autoencoder` is None where the head says tokens."""
        self._model, self._autoencoder, self._noise, self._samples = model, autoencoder, noise, n
        self._tokens: list[Tensor] = []  # [P' N, B, K] each
        self._log_probabilities: list[Tensor] = []
        self.latents = model.head.sample(hidden, noise, n)
        likely = model.shape.head.reads_tokens
        self._add(hidden.repeat_interleave(n, 0) if likely else hidden, self.latents.transpose(1, 2).flatten(0, 1))

    def advance(self, hidden: Tensor) -> None:
        """Draw another chunk for each branch from the hidden states `[P' N, B, d]` that `said` led to."""
        noise, step = self._noise, len(self._tokens)
        after = SampleNoise(noise.seed, noise.samples, noise.device, f"{noise.purpose}/step-{step}")
        self._add(hidden, self._model.head.sample(hidden, after, 1).squeeze(2))

    @property
    def tokens(self) -> Tensor:
        """`[P', B, N, T]`."""
        return self._by_place(torch.cat(self._tokens, -1))

    @property
    def log_probability(self) -> Tensor | None:
        """Of each token given all before it `[P', B, N, T]`; None where the head has no likelihood."""
        return self._by_place(torch.stack(self._log_probabilities, -1)) if self._log_probabilities else None

    def _add(self, hidden: Tensor, drawn: Tensor) -> None:
        tokens = drawn if self._autoencoder is None else self._autoencoder.decode_tokens(drawn)
        said = gathered_positions(tokens, self._model.config)
        if self._model.shape.head.reads_tokens:
            self._log_probabilities.append(self._model.head.log_probabilities(hidden, said.squeeze(-1)))
        self._tokens.append(tokens)
        self.said = said.transpose(0, 1)

    def _by_place(self, branches: Tensor) -> Tensor:
        """`[P' N, B, T]` -> `[P', B, N, T]`."""
        return branches.unflatten(0, (-1, self._samples)).transpose(1, 2)


def branching_cache(k: int) -> BranchingCache | None:
    """What the hidden states of windows are computed with for a roll-out; None where one chunk has four tokens."""
    return BranchingCache() if chunks_to_draw(k) > 1 else None


# The places are filled up to a multiple of this, so that tensor-parallel ranks can share them out and the noise of a
# place is the same in any layout.
SHARED_OUT = 8

ClusteredScores = tuple[tuple[str, ...], tuple[Tensor, Tensor, Tensor]]

"""Names of the scores, and the state of a `BrierAccumulator` over them: what ranks exchange."""


@dataclass(frozen=True)
class HeldOut:
    """What a model is scored on.

    Attributes:
        windows: of the held-out split.
        autoencoder: turns sampled latents into tokens; None where the head says tokens itself.
        counts: of each token in the training split `[V]`, for the unigram baseline; None: there is none.
        seed: of the evaluation's noise.
        config: how much of it.
    """

    windows: Windows
    autoencoder: Autoencoder | None
    counts: np.ndarray | None
    seed: int
    config: EvaluationConfig

    @property
    def positions(self) -> Tensor:
        """The scored positions of each window `[P]`."""
        return scored_positions(self.windows.positions, self.windows.store.k, self.config.places)

    def places(self, ranks: int) -> Tensor:
        """The same, the last one repeated so that this number of sequence-parallel ranks can share them out."""
        positions = self.positions
        return torch.cat([positions, positions[-1:].expand(-len(positions) % lcm(SHARED_OUT, ranks))])

    def branches(self, ranks: int) -> Tensor:
        """The position that each branch of a roll-out follows, `[P N]`."""
        return self.places(ranks).repeat_interleave(self.config.samples)

    def description(self) -> dict[str, Any]:
        """What was measured: the name of BrierLM, places of a window, draws of a place and the chunks of each."""
        k, packing = self.windows.store.k, self.windows.store.packing
        return {
            "measure": measure(self.windows.positions * k, k, packing),
            "places_per_window": len(self.positions),
            "samples": self.config.samples,
            "rollout_chunks": chunks_to_draw(k),
        }


class ScoredBatch(NamedTuple):
    """A micro-batch of held-out windows on its way to scores.

    Attributes:
        model: the network, of which this rank holds the last stage.
        held_out: what it is scored on.
        batch: the windows.
        hidden: hidden states of the rank's own positions `[S', B, d]`.
        target: the true next chunks `[S, B, ...]`.
        noise: the streams of these windows.
        places: the scored positions, the last one repeated `[P]`.
        own: which of them are this rank's and no repetition: `[P']` bool over its share.
        draws: at this rank's share of the places.
    """

    model: CalmModel
    held_out: HeldOut
    batch: ChunkBatch
    hidden: Tensor
    target: Target
    noise: SampleNoise
    places: Tensor
    own: Tensor
    draws: Draws

    @property
    def truth(self) -> Tensor:
        """The true next four tokens at every place, `[P, B, 4]`."""
        return self._next_four(self.batch.tokens).to(self.hidden.device)

    @property
    def text(self) -> Tensor:
        """Whether the next n = 1..4 tokens at every place are text and no padding, `[P, B, 4]` bool, on the host."""
        text = text_tokens(self.batch.tokens, self.held_out.windows.store.padding)
        return self._next_four(text).cumprod(-1) > 0

    def _next_four(self, of_chunks: Tensor) -> Tensor:
        offsets = ((self.places + 1) * self.model.shape.k).unsqueeze(1) + torch.arange(MAX_TOKENS)
        return of_chunks.flatten(1)[:, offsets].transpose(0, 1)


def scored_batch(model: CalmModel, hidden: Tensor, batch: ChunkBatch, held_out: HeldOut) -> ScoredBatch:
    """Draw the next chunks from the hidden states `[S', B, d]` of windows, whose samples are the windows themselves.

    Only the scored places are drawn from. For chunks of fewer than four tokens the draws are to be advanced.
    """
    config, device = model.config, hidden.device
    noise = SampleNoise(held_out.seed, batch.samples, device, purpose="evaluation")
    places = held_out.places(config.tensor_model_parallel_size)
    own = own_positions(torch.arange(len(places)) < len(held_out.positions), config)
    shared_out = own_positions(gathered_positions(hidden, config)[places], config)
    draws = Draws(model, held_out.autoencoder, noise, shared_out, held_out.config.samples)
    return ScoredBatch(model, held_out, batch, hidden, batch.target(device), noise, places, own, draws)


def scores(scored: ScoredBatch) -> dict[str, Tensor]:
    """At this rank's share of the places `[P', B]` each: Brier-1..4 and, of each, its square and the variance that the
    draws account for; collision rate, unigram baseline, and the loss of the head.
    """
    model, draws, counts = scored.model, scored.draws, scored.held_out.counts
    truth = own_positions(scored.truth, model.config)
    if draws.log_probability is None:
        brier, within = brier_terms(draws.tokens, truth), within_variance(draws.tokens, truth)
    else:
        brier = autoregressive_brier_terms(_log_probability_of_truth(scored), draws.log_probability)
        within = autoregressive_within_variance(draws.log_probability)
    loss = model.head.loss(scored.hidden, scored.target, scored.noise).loss
    return {
        **_numbered("brier", brier.score),
        **_numbered("square", brier.score.square()),
        **_numbered("variance_within", within),
        "collision_1": brier.collision[..., 0],
        **({} if counts is None else baseline("unigram", unigram_brier_terms(torch.from_numpy(counts), truth.cpu()))),
        "loss": at_places(loss, scored),
    }


def at_places(values: Tensor, scored: ScoredBatch) -> Tensor:
    """Values `[S', B]` of this rank's own positions -> `[P', B]` of its share of the places."""
    config = scored.model.config
    return own_positions(gathered_positions(values, config)[scored.places], config)


def baseline(name: str, terms: BrierTerms) -> dict[str, Tensor]:
    """Brier-1, Brier-2, ... `[P, B]` of a baseline by name."""
    return _numbered(f"{name}_brier", terms.score)


def clustered(scores: dict[str, Tensor], scored: ScoredBatch) -> ClusteredScores:
    """Scores `[P', B]` summed by the document that each target chunk begins in.

    A score named `..._n` counts where the next n tokens are text, one without a number where the first is.
    """
    counted = torch.stack([scored.text[..., _token_of(name)] for name in scores], -1)
    documents = torch.from_numpy(scored.held_out.windows.document_ids(scored.batch.samples)).T[scored.places + 1]
    values = torch.stack([score.cpu().double() for score in scores.values()], -1)
    documents, counted = (own_positions(x, scored.model.config) for x in (documents, counted))
    documents, counted, values = (x[scored.own].flatten(0, 1) for x in (documents, counted, values))
    accumulator = BrierAccumulator(len(scores))
    accumulator.add(values, documents, counted)
    return tuple(scores), accumulator.state()


def _token_of(name: str) -> int:
    """The last token of the target that a score looks at, counted from 0."""
    number = name.rpartition("_")[2]
    return int(number) - 1 if number.isdigit() else 0


def summarize(parts: Iterable[ClusteredScores]) -> dict[str, Any]:
    """Each score's mean under its name and its standard error, clustered by document, under `name_error`; BrierLM.

    `brier_lm` is None with a `brier_lm_reason` unless Brier-1..4 are all significant; an error is None where a single
    document cannot tell. Of the variance of a place's Brier-n, `variance_within_n` is due to the draws and falls with
    their number, `variance_between_n` to the place and falls with the number of places alone.
    """
    parts = list(parts)
    names = parts[0][0]
    total = BrierAccumulator(len(names))
    for _, state in parts:
        total.merge(state)
    result = total.result()
    errors = [error if result.clusters > 1 else None for error in result.standard_error.tolist()]
    named: dict[str, Any] = {}
    for name, mean, error in zip(names, result.mean.tolist(), errors, strict=True):
        named[name], named[f"{name}_error"] = mean, error
    for n in (n for n in range(1, MAX_TOKENS + 1) if f"square_{n}" in names):
        del named[f"square_{n}_error"], named[f"variance_within_{n}_error"]
        variance = named.pop(f"square_{n}") - named[f"brier_{n}"] ** 2
        variance *= result.positions / max(result.positions - 1, 1)
        named[f"variance_between_{n}"] = variance - named[f"variance_within_{n}"]
    own = [index for index, name in enumerate(names) if name.startswith("brier_")]
    lm = brier_lm(ClusteredMean(result.mean[own], result.covariance[own][:, own], result.positions, result.clusters))
    named |= {"brier_lm": lm.value, "brier_lm_error": lm.standard_error, "brier_lm_reason": lm.reason}
    return named | {"scored_positions": result.positions, "documents": result.clusters}


def _log_probability_of_truth(scored: ScoredBatch) -> Tensor:
    """log P of each true next token given all before it, by teacher forcing, `[P', B, n]`."""
    config, truth = scored.model.config, scored.truth
    hidden = gathered_positions(scored.hidden, config)
    return torch.stack(
        [
            scored.model.head.log_probabilities(own_positions(hidden[scored.places + i], config), token)
            for i, token in enumerate(truth.unbind(-1))
        ],
        -1,
    )


def _numbered(name: str, values: Tensor) -> dict[str, Tensor]:
    """Columns `[P, B]` of `[P, B, n]` by name."""
    return {f"{name}_{n}": column for n, column in enumerate(values.unbind(-1), 1)}
