from functools import partial
from pathlib import Path
from threading import Thread, current_thread, main_thread

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calm_core import config
from calm_core.autoencoder.model import Autoencoder, FoldedEncoder
from calm_core.config.data_config import DataConfig
from calm_core.config.experiment import EvaluationConfig, Experiment, SamplesConfig
from calm_core.config.model_config import BackboneConfig, HeadConfig, ModelShape
from calm_core.config.training_config import ParallelConfig
from calm_core.data.chunks import EncodedStore, build_chunks, chunk_offsets, chunked, text_tokens, tokens_before
from calm_core.data.dataset import Blend, TrainingSamples, chunk_rows, read_batch
from calm_core.data.store import ChunkStore, TokenStore
from calm_core.errors import UserError
from calm_core.inference.load_model import DocumentFormat
from calm_core.training.batch_loader import Loader
from calm_core.training.calm_task import CalmTask


def test_only_the_pad_that_ends_a_chunk_is_no_text():
    tokens = torch.tensor([[5, 6, 7, 8], [5, 0, 7, 0], [0, 5, 0, 0], [0, 0, 0, 0]])
    assert text_tokens(tokens, 0).int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert text_tokens(tokens, None).all()


PAD = 0

lengths = st.lists(st.integers(1, 20), min_size=1, max_size=20)


@given(lengths, st.integers(1, 6))
def test_an_aligned_document_has_its_own_chunks_and_nothing_else_is_in_them(lengths, k):
    offsets = np.append(0, np.cumsum(lengths))
    tokens = np.arange(1, offsets[-1] + 1).astype(np.uint16)
    chunks, starts = chunked(tokens, offsets, k, PAD, "align"), chunk_offsets(offsets, k, "align")
    assert len(chunks) == starts[-1]
    for number, length in enumerate(lengths):
        own = chunks[starts[number] : starts[number + 1]].ravel()
        assert own[:length].tolist() == tokens[offsets[number] : offsets[number + 1]].tolist()
        assert len(own) - length < k
        assert not own[length:].any()
    counts = [tokens_before(row, offsets, k, "align") for row in range(len(chunks) + 1)]
    assert np.diff(counts).tolist() == (chunks != PAD).sum(1).tolist()


@given(lengths, st.integers(1, 6))
def test_packed_documents_follow_each_other_and_a_chunk_is_of_the_document_it_begins_in(lengths, k):
    offsets = np.append(0, np.cumsum(lengths))
    tokens = np.arange(1, offsets[-1] + 1).astype(np.uint16)
    chunks = chunked(tokens, offsets, k, PAD, "pack")
    assert chunks.ravel()[: len(tokens)].tolist() == tokens.tolist()
    assert len(chunks) == -(-len(tokens) // k)
    found = np.searchsorted(chunk_offsets(offsets, k, "pack"), np.arange(len(chunks)), side="right") - 1
    assert found.tolist() == (np.searchsorted(offsets, np.arange(len(chunks)) * k, side="right") - 1).tolist()
    assert tokens_before(len(chunks), offsets, k, "pack") == len(tokens)


def test_an_aligned_store_holds_each_document_in_chunks_of_its_own(tokens, built_chunks, autoencoder, tmp_path):
    build_chunks(tokens, autoencoder, tmp_path / "chunks", packing="align")
    source, store = TokenStore(tokens, "train"), ChunkStore(tmp_path / "chunks", "train")
    assert (store.packing, store.padding) == ("align", source.manifest["pad"])
    assert ChunkStore(built_chunks, "train").padding is source.padding is None
    rows = store.read(0, len(store), ("tokens",))["tokens"]
    documents, of_tokens = store.document_ids(0, len(store)), source.document_ids(0, len(source))
    text = source.read(0, len(source), ("tokens",))["tokens"]
    for document in range(source.document_count):
        wanted = text[of_tokens == document].tolist()
        found = rows[documents == document].ravel().tolist()
        assert found[: len(wanted)] == wanted
        assert found[len(wanted) :] == [store.padding] * (-len(wanted) % 4)
    assert store.manifest["splits"]["train"]["tokens"] == len(source) == store.token_counts().sum()


def test_a_run_and_a_blend_take_chunks_of_one_packing(tokens, built_chunks, autoencoder, tmp_path):
    build_chunks(tokens, autoencoder, tmp_path / "chunks", packing="align")
    paths = Experiment(run=str(tmp_path)).paths
    with pytest.raises(UserError, match=r"data\.packing=pack, but .* were made with align"):
        chunk_rows(DataConfig(), paths, autoencoder)
    assert chunk_rows(DataConfig(packing="align"), paths, autoencoder).held_out.packing == "align"
    blend = [{"chunks": str(tmp_path / "chunks")}, {"chunks": str(built_chunks)}]
    with pytest.raises(UserError, match="differ in the packing"):
        chunk_rows(config.convert({"blend": blend}, DataConfig), paths, autoencoder)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_encoding_reads_what_is_stored(tokens, built_chunks, autoencoder, split):
    store, found = ChunkStore(built_chunks, split), EncodedStore(tokens, split, autoencoder)
    assert len(found) == len(store)
    assert found.columns == store.columns
    assert (found.k, found.latent, found.vocab_size) == (store.k, store.latent, store.vocab_size)
    wanted, read = (rows.read(0, len(rows), rows.columns) for rows in (store, found))
    assert np.array_equal(read["tokens"], wanted["tokens"])
    assert np.array_equal(found.read(3, 5, ("mean",))["mean"], read["mean"][3:8])
    with pytest.raises(IndexError):
        found.read(len(found) - 1, 2, ("tokens",))
    for name in ("mean", "log_std"):
        assert read[name].dtype == np.float16
        np.testing.assert_allclose(read[name], wanted[name], rtol=2**-10, atol=1e-6)
    assert np.array_equal(found.document_ids(0, len(found)), store.document_ids(0, len(store)))
    assert [found.document(row) for row in range(0, len(store), 97)] == [
        store.document(row) for row in range(0, len(store), 97)
    ]
    difference = store.token_counts() - found.token_counts()
    assert difference.sum() == difference[store.manifest["pad"]] == -found.manifest["splits"][split]["tokens"] % 4


def test_samples_and_identity_of_an_encoded_store_are_those_of_the_stored_chunks(tokens, built_chunks, autoencoder):
    stores = ChunkStore(built_chunks, "train"), EncodedStore(tokens, "train", autoencoder)
    assert stores[0].identity == stores[1].identity
    Blend(stores, [None, None])  # one may be blended with the other
    samples = np.array([3, 100, 41])
    sources = [TrainingSamples(Blend.of(store), 7, seed=1) for store in stores]
    first, second = (read_batch(source, samples, samples, ("tokens", "mean")) for source in sources)
    assert np.array_equal(first.tokens, second.tokens)
    np.testing.assert_allclose(first.mean, second.mean, rtol=2**-10, atol=1e-6)


def test_nothing_is_encoded_for_a_stage_that_reads_tokens_alone(tokens, autoencoder, monkeypatch):
    store = EncodedStore(tokens, "train", autoencoder)
    monkeypatch.setattr("calm_core.data.chunks.encoded", None)
    assert store.read(5, 9, ("tokens",))["tokens"].shape == (9, 4)


def test_tokens_that_do_not_fit_the_autoencoder_are_refused(tokens, autoencoder):
    data, paths = DataConfig(latents="encode", tokens=str(tokens)), Experiment(run="unused").paths
    with pytest.raises(UserError, match=r"data\.k=2, but .* is made for 4 tokens"):
        chunk_rows(DataConfig(latents="encode", k=2), paths, autoencoder)
    assert chunk_rows(data, Experiment(data=data).paths, autoencoder).held_out.split == "held_out"
    autoencoder.tokenizer_hash = "another"
    with pytest.raises(UserError, match="trained with the tokenizer another"):
        EncodedStore(tokens, "train", autoencoder)
    with pytest.raises(UserError, match=r"set data\.packing=pack"):
        DataConfig(latents="encode", packing="align")


def test_a_training_run_reads_tokens_in_the_thread_and_has_them_encoded_in_the_step(
    tokens: Path, built_chunks: Path, autoencoder: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that another thread calls would wait for the step on the device, and the step for it."""
    threads: list[Thread] = []
    encode = FoldedEncoder.encode

    def watched(encoder: FoldedEncoder, chunks: Tensor) -> tuple[Tensor, Tensor]:
        threads.append(current_thread())
        return encode(encoder, chunks)

    monkeypatch.setattr(FoldedEncoder, "encode", watched)
    shape = ModelShape(BackboneConfig(layers=1, hidden=8, ffn=8, heads=1), HeadConfig(noise=4), 400, 4, 8)
    targets = []
    for kind in (partial(EncodedStore, tokens, autoencoder=autoencoder), partial(ChunkStore, built_chunks)):
        train, held_out = kind(split="train"), kind(split="held_out")
        rest = (train.token_counts(), EvaluationConfig(windows=4), SamplesConfig(), DocumentFormat())
        task = CalmTask(shape, ParallelConfig(), 7, 0, Blend.of(train), held_out, autoencoder, *rest)
        with Loader(task.load, lambda start: [np.arange(5)], 0, 5, 1, torch.device("cpu")) as loader:
            [batch], _ = loader.next()
        targets.append(task._target(batch))
    assert set(threads) == {main_thread()}
    encoded, stored = targets
    assert torch.equal(encoded.tokens, stored.tokens)
    for found, wanted in zip((encoded.mean, encoded.log_std), (stored.mean, stored.log_std), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=2**-10, atol=1e-6)
