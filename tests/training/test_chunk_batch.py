"""What pipeline stages read of a store."""

from pathlib import Path

import numpy as np
import pytest
import torch

from calm_core.data.store import ChunkStore
from calm_core.data.windows import Windows
from calm_core.training.chunk_batch import needed_columns, read_batch

CHOSEN, SAMPLES = np.array([3, 0]), np.array([7, 8])


@pytest.mark.parametrize(
    ("first", "last", "wanted"),
    [
        (True, True, {"tokens", "mean", "log_std"}),
        (True, False, {"tokens"}),
        (False, False, set()),
        (False, True, {"tokens", "mean", "log_std"}),
    ],
)
def test_a_stage_reads_only_what_it_works_on(
    tiny_experiment: Path, monkeypatch: pytest.MonkeyPatch, first: bool, last: bool, wanted: set[str]
) -> None:
    store = ChunkStore(tiny_experiment / "chunks", "train")
    whole = read_batch(Windows(store, 32), CHOSEN, SAMPLES)
    read: list[str] = []
    fill = ChunkStore.fill
    monkeypatch.setattr(ChunkStore, "fill", lambda store, start, out: (read.extend(out), fill(store, start, out)))
    columns = needed_columns(store, first=first, last=last)
    batch = read_batch(Windows(store, 32), CHOSEN, SAMPLES, columns)
    assert set(read) == wanted
    assert len(read) == 2 * len(wanted)
    for name in ("tokens", "mean", "log_std"):
        array = getattr(batch, name)
        assert torch.equal(array, getattr(whole, name)) if name in wanted else array is None
    assert batch.samples is SAMPLES
