from functools import partial
from pathlib import Path
from threading import Thread, current_thread, main_thread

import numpy as np
import pytest
import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, FoldedEncoder
from calm_core.config.data_config import DataConfig
from calm_core.config.experiment import EvaluationConfig, Experiment, SamplesConfig
from calm_core.config.model_config import BackboneConfig, HeadConfig, ModelShape
from calm_core.config.training_config import ParallelConfig
from calm_core.data.dataset import Blend, TrainingSamples, chunk_rows, read_batch
from calm_core.data.encoded_store import EncodedStore
from calm_core.data.store import ChunkStore
from calm_core.errors import UserError
from calm_core.inference.load_model import DocumentFormat
from calm_core.training.batch_loader import Loader
from calm_core.training.calm_task import CalmTask


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


def test_its_samples_and_its_identity_are_those_of_the_store(tokens, built_chunks, autoencoder):
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
    monkeypatch.setattr("calm_core.data.encoded_store.encoded", None)
    assert store.read(5, 9, ("tokens",))["tokens"].shape == (9, 4)


def test_what_does_not_fit_is_refused(tokens, autoencoder):
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
