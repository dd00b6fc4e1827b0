"""Means over positions whose standard errors count documents, not positions; and BrierLM, made of four of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from calm_core.evaluation.brier import MAX_TOKENS

CONFIDENCE = 0.95  # that an interval of `interval_factor` standard errors covers the mean
SIGNIFICANT = 2.0  # standard errors above zero, at least, for a score to count as significant
BLOCKS = 32  # that the positions of a single document are divided into, at most

Clusters = Literal["documents", "blocks"]


def interval_factor(clusters: int) -> float:
    """Half the width of a 95 % interval, in standard errors from this number of clusters.

    The quantile of Student's t with C - 1 degrees of freedom: 4.30 for 3 clusters, 2.26 for 10, 1.96 for many.
    """
    from scipy.special import stdtrit

    return float(stdtrit(clusters - 1, (1 + CONFIDENCE) / 2))


def half_interval(record: Mapping[str, Any], key: str) -> float | None:
    """Half the width of the 95 % interval of a score; None where its standard error is not known.

    An evaluation, or the row that a study has of it, says how many standard errors that is, more with few documents;
    one that does not say it gets two.
    """
    error = record.get(f"{key}_error")
    said = record.get("interval_factor") or (record.get("standard_errors") or {}).get("interval_factor")
    factor = said or 2.0
    return None if error is None else factor * error


@dataclass(frozen=True)
class ClusteredMean:
    """Means over positions with their uncertainty when the positions of a cluster are not independent.

    Attributes:
        mean: `[n]` float64; NaN without positions.
        covariance: `[n, n]` of the means; NaN with fewer than two clusters.
        positions: number of positions.
        clusters: number of clusters, C.
        unit: what they are: documents, or blocks of positions where there is a single document.
    """

    mean: Tensor
    covariance: Tensor
    positions: int
    clusters: int
    unit: Clusters = "documents"

    @property
    def standard_error(self) -> Tensor:
        """`[n]`; NaN with fewer than two clusters."""
        return self.covariance.diagonal().sqrt()

    @property
    def documents(self) -> int:
        """Number of documents."""
        return self.clusters if self.unit == "documents" else 1


class BrierAccumulator:
    """Means of per-position values, clustered by document; batches and ranks merge to the same result.

    It holds one row per document and block of positions: for each column the number of its positions and the sum of
    their values.
    """

    def __init__(self, columns: int) -> None:
        """For values with `columns` columns."""
        self._keys = torch.empty(0, 2, dtype=torch.int64)
        self._counts = torch.empty(0, columns, dtype=torch.int64)
        self._sums = torch.empty(0, columns, dtype=torch.float64)

    def add(
        self, values: Tensor, documents: Tensor, counted: Tensor | None = None, blocks: Tensor | None = None
    ) -> None:
        """Add positions.

        Args:
            values: `[P, n]`.
            documents: the document of each position, `[P]` int64.
            counted: which values count, `[P, n]` bool; None: all.
            blocks: a number for each short run of neighbouring positions, ascending in the text, `[P]` int64; it serves
                where all positions turn out to be of one document. None: there is one block.
        """
        values, documents = values.detach().cpu().double(), documents.cpu()
        blocks = torch.zeros_like(documents) if blocks is None else blocks.cpu()
        counted = torch.ones_like(values, dtype=torch.bool) if counted is None else counted.cpu()
        self.merge((torch.stack([documents, blocks], 1), counted.long(), values.where(counted, 0)))

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """Document and block `[R, 2]` int64, positions `[R, n]` int64, sums `[R, n]` float64: what ranks exchange."""
        return self._keys, self._counts, self._sums

    def merge(self, state: tuple[Tensor, Tensor, Tensor]) -> None:
        """Add the state of another accumulator; a document may appear in both."""
        keys, counts, sums = (torch.cat(pair) for pair in zip(self.state(), state, strict=True))
        self._keys, row = keys.unique(dim=0, return_inverse=True)
        self._counts, self._sums = _summed(counts, row, len(self._keys)), _summed(sums, row, len(self._keys))

    def result(self) -> ClusteredMean:
        """Means with their cluster-robust covariance.

        The clusters are the documents; where there is only one, up to `BLOCKS` blocks of consecutive positions. The
        residual of a cluster with the fraction a of the positions is divided by sqrt(1 - 2 a + sum of all a^2), which
        makes the variance unbiased if clusters vary alike: for equal ones that is the factor C / (C - 1).
        """
        filled = (self._counts > 0).any(1)
        documents, cluster = self._keys[filled, 0].unique(return_inverse=True)
        unit: Clusters = "documents"
        blocks = int(filled.sum())
        if len(documents) == 1 and blocks > 1:  # rows are sorted by block
            unit, cluster = "blocks", torch.arange(blocks) * min(blocks, BLOCKS) // blocks
        clusters = int(cluster.max()) + 1 if len(cluster) else 0
        counts, sums = (_summed(rows[filled], cluster, clusters) for rows in (self._counts, self._sums))
        total = counts.sum(0)
        mean = sums.sum(0) / total
        fraction = counts / total
        free = 1 - 2 * fraction + fraction.square().sum(0)
        # A cluster that has all positions leaves no residual, which says nothing about how clusters differ.
        residual = ((sums - counts * mean) / total / free.sqrt()).where(free > 1e-12, torch.nan)
        return ClusteredMean(mean, residual.mT @ residual, int(total.max()), clusters, unit)


def clustered_mean(values: Tensor, documents: Tensor) -> ClusteredMean:
    """Means of `values` `[P, n]` over positions, with standard errors clustered by `documents` `[P]` int64."""
    accumulator = BrierAccumulator(values.shape[1])
    accumulator.add(values, documents)
    return accumulator.result()


class BrierLM(NamedTuple):
    """BrierLM and its standard error, or None and the reason why it is not reported."""

    value: float | None
    standard_error: float | None
    reason: str | None


def brier_lm(brier: ClusteredMean) -> BrierLM:
    """100 * (Brier-1 * Brier-2 * Brier-3 * Brier-4)^(1/4), from the four means (paper, section 4).

    Reported only when each of the four exceeds two standard errors, and more with few clusters (`interval_factor`): the
    product of four negative scores is positive, so without this a predictor that is always wrong scores 100. The
    standard error is by the delta method.
    """
    if len(brier.mean) != MAX_TOKENS:
        return BrierLM(None, None, f"BrierLM needs Brier-1 to Brier-4; only {len(brier.mean)} of them were estimated.")
    if brier.clusters < 2:
        return BrierLM(None, None, "Standard errors need at least two documents, or two blocks of positions in one.")
    error, factor = brier.standard_error, max(SIGNIFICANT, interval_factor(brier.clusters))
    doubtful = [f"Brier-{n + 1}" for n in range(MAX_TOKENS) if not brier.mean[n] > factor * error[n]]
    if doubtful:
        return BrierLM(None, None, f"Not above zero by {factor:.3g} standard errors: {', '.join(doubtful)}.")
    value = 100 * brier.mean.log().mean().exp()
    slope = value / (MAX_TOKENS * brier.mean)
    return BrierLM(value.item(), (slope @ brier.covariance @ slope).sqrt().item(), None)


def _summed(rows: Tensor, group: Tensor, groups: int) -> Tensor:
    """The rows `[R, n]` summed by group, `[groups, n]`."""
    return rows.new_zeros(groups, rows.shape[1]).index_add_(0, group, rows)
