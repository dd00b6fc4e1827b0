"""What pipeline stages read of a store."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from calm_core.config.data_config import DataConfig, StoreShare
from calm_core.config.experiment import Experiment
from calm_core.data.chunks import build_chunks
from calm_core.data.dataset import Blend, TrainingSamples, Windows, chunk_rows, needed_columns, read_batch, token_rows
from calm_core.data.order import SampleOrder
from calm_core.data.store import ChunkStore, TokenStore
from calm_core.errors import UserError

POSITIONS = 7


def blend(*shares: StoreShare, seed: int = 0) -> TrainingSamples:
    return TrainingSamples(Blend([ChunkStore(share.chunks, "train") for share in shares], shares), POSITIONS, seed)


def test_a_store_by_itself_is_walked_in_the_order_of_its_windows(built_chunks):
    store = ChunkStore(built_chunks, "train")
    windows, samples = Windows(store, POSITIONS), np.arange(2 * len(Windows(store, POSITIONS)))
    found = TrainingSamples(Blend.of(store), POSITIONS, seed=5)
    assert [window for _, window in found.windows_of(samples)] == SampleOrder(len(windows), 5).window(samples).tolist()
    batch = read_batch(found, samples[:9], samples[:9])
    alone = read_batch(windows, SampleOrder(len(windows), 5).window(samples[:9]), samples[:9])
    for name in store.columns:
        assert np.array_equal(getattr(batch, name), getattr(alone, name))


def test_a_blend_takes_the_windows_of_each_store_once_an_epoch_in_another_order_each_time(built_chunks, other_chunks):
    samples = blend(StoreShare(str(built_chunks)), StoreShare(str(other_chunks), epochs=2))
    places = samples.windows_of(np.arange(1500))
    counts = [len(windows) for windows in samples.windows]
    taken = [[window for store, window in places if store is windows] for windows in samples.windows]
    assert len(taken[1]) == 2 * counts[1]
    for windows, count in zip(taken, counts, strict=True):
        epochs = [windows[first : first + count] for first in range(0, len(windows) - count + 1, count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs) >= 2
    batch = read_batch(samples, np.array([3, 1499, 0]), np.array([3, 1499, 0]), ("tokens", "mean"))
    for row, sample in enumerate((3, 1499, 0)):
        store, window = places[sample]
        alone = read_batch(store, np.array([window]), np.array([sample]), ("tokens", "mean"))
        assert np.array_equal(batch.tokens[row], alone.tokens[0])
        assert np.array_equal(batch.mean[row], alone.mean[0])
    documents = samples.documents(np.array([3, 1499, 0]))
    assert documents == list(dict.fromkeys(name for n in (3, 1499, 0) for name in places[n][0].documents(places[n][1])))
    assert len(documents) >= 3


def test_budgets_are_weights_and_limits_in_tokens(built_chunks, other_chunks):
    per_sample = POSITIONS * 4
    samples = blend(
        StoreShare(str(built_chunks), budget=30 * per_sample), StoreShare(str(other_chunks), budget=11 * per_sample - 1)
    )
    samples.require(40)
    with pytest.raises(UserError, match="give 40 samples"):
        samples.require(41)
    stores = [samples.windows.index(store) for store, _ in samples.windows_of(np.arange(40))]
    assert (stores.count(0), stores.count(1)) == (30, 10)
    with pytest.raises(UserError, match="less than one sample"):
        blend(StoreShare(str(built_chunks), budget=per_sample - 1))


def test_the_configuration_names_the_stores_of_a_blend(tokens, built_chunks, other_tokens, other_chunks, autoencoder):
    shares = [StoreShare(str(other_chunks), str(other_tokens), 2.0), StoreShare(str(built_chunks), str(tokens))]
    data = DataConfig(blend=shares)
    paths = Experiment(run="unused").paths
    rows = chunk_rows(data, paths, autoencoder)
    assert [store.folder for store in rows.train.stores] == [other_chunks, built_chunks]
    assert (rows.held_out.folder, rows.held_out.split) == (other_chunks, "held_out")
    assert [store.folder for store in token_rows(data, paths).train.stores] == [other_tokens, tokens]
    alone = chunk_rows(DataConfig(), replace(paths, chunks=built_chunks), autoencoder)
    assert alone.train.identity == ChunkStore(built_chunks, "train").identity
    with pytest.raises(UserError, match=r"data\.blend\[1\] names no store of tokens"):
        token_rows(replace(data, blend=[shares[0], StoreShare(str(built_chunks))]), paths)


def test_the_identity_of_a_blend_is_that_of_stores_and_shares(built_chunks, other_chunks):
    def identity(*shares: StoreShare):
        return Blend([ChunkStore(share.chunks, "train") for share in shares], shares).identity

    first, second = StoreShare(str(built_chunks)), StoreShare(str(other_chunks))
    alike = identity(first, second)
    assert alike == identity(replace(first, tokens="elsewhere"), second)
    changes = [replace(second, weight=0.5), replace(second, epochs=1), first]
    assert all(identity(first, changed) != alike for changed in changes)
    assert isinstance(identity(first), str)
    assert identity(replace(first, epochs=1)) != identity(first)


def test_stores_that_do_not_belong_together_are_refused(tokens, built_chunks, other_tokens, autoencoder, tmp_path):
    autoencoder.content_hash = "another autoencoder"
    build_chunks(other_tokens, autoencoder, tmp_path / "chunks")
    with pytest.raises(UserError, match="differ in the autoencoder"):
        blend(StoreShare(str(built_chunks)), StoreShare(str(tmp_path / "chunks")))
    store, stranger = TokenStore(tokens, "train"), TokenStore(other_tokens, "train")
    stranger.manifest["made_from"]["tokenizer"] = "another"
    with pytest.raises(UserError, match="differ in the tokenizer"):
        Blend([store, stranger], [StoreShare(), StoreShare()])


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        ([StoreShare("a", weight=0)], r"blend\[0\] \(a\) needs weight > 0"),
        ([StoreShare("a"), StoreShare("b", epochs=-1)], r"blend\[1\] \(b\) needs"),
        ([StoreShare("a", budget=5), StoreShare("b")], "a budget to every store"),
        ([StoreShare("a"), StoreShare("b", weight=1e-7)], "less than 1e-06 of the samples"),
    ],
)
def test_shares_that_say_nothing_are_refused(shares, sentence):
    with pytest.raises(UserError, match=sentence):
        DataConfig(blend=shares)


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
