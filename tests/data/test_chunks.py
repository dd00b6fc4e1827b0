import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calm_core import config
from calm_core.config.data_config import DataConfig
from calm_core.config.experiment import Experiment
from calm_core.data.chunks import build_chunks, chunk_offsets, chunked, text_tokens, tokens_before
from calm_core.data.dataset import chunk_rows
from calm_core.data.store import ChunkStore, TokenStore
from calm_core.errors import UserError


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
def test_packed_documents_run_on_and_a_chunk_is_of_the_document_it_begins_in(lengths, k):
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
