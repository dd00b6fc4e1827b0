import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calm_core.data import chunks as chunk_stores
from calm_core.data import store as store_module
from calm_core.data.chunks import EncodedStore, build_chunks, chunked, documents_of
from calm_core.data.corpus import Tally, documents, records, sources
from calm_core.data.dataset import Windows, read_batch
from calm_core.data.split import Split
from calm_core.data.store import ChunkStore, TokenStore, read_shard, verify_shards
from calm_core.data.tokens import build_tokens
from calm_core.data.verification import faults
from calm_core.errors import UserError
from calm_core.io import CHECKSUM, MANIFEST, read_json, read_manifest, store_hash, write_json


def side(text, held_out):
    (part,) = Split("document", held_out).parts(text)
    return part.side


def corpus_of(config, split):
    whole = [record for source in sources(config.corpus) for record in records(source, config.text_field)]
    return [document for document in documents(whole, "text", Tally()) if side(document.text, config.held_out) == split]


def all_tokens(store):
    return store.read(0, len(store), ("tokens",))["tokens"]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_token_store_holds_the_documents_of_its_split(config, tokens, tokenizer, split):
    store, wanted = TokenStore(tokens, split), corpus_of(config, split)
    expected = [[tokenizer.bos, *tokenizer.encode(document.text), tokenizer.eos] for document in wanted]
    assert all_tokens(store).tolist() == [token for document in expected for token in document]
    assert len(store.shards) > 1
    assert store.document_count == len(wanted)
    ids = store.document_ids(0, len(store))
    assert ids.tolist() == [number for number, document in enumerate(expected) for _ in document]
    assert [store.document_name(number) for number in range(len(wanted))] == [document.name for document in wanted]


def test_splits_share_the_corpus(config, tokens):
    total = sum(TokenStore(tokens, split).document_count for split in ("train", "held_out"))
    assert total == 60
    assert 5 <= TokenStore(tokens, "held_out").document_count <= 25  # 15 of 60 expected


def test_side_of_a_document_depends_on_its_text_alone():
    sides = [side(f"document {number}", 0.1) for number in range(5000)]
    assert 400 < sides.count("held_out") < 600
    smaller = [side(f"document {number}", 0.05) for number in range(5000)]
    assert all(a == "held_out" for a, b in zip(sides, smaller, strict=True) if b == "held_out")
    assert side("document", 0.0) == "train"


def test_a_document_stays_on_its_side_as_the_corpus_grows(config, tokens, tokenizer, tmp_path):
    part = replace(config, corpus=[config.corpus[0].replace("*", "b")], shard_bytes=config.shard_bytes // 2)
    build_tokens(part, tokenizer, tmp_path / "tokens")
    for split in ("train", "held_out"):
        before, after = (
            {store.document_name(number).rpartition("/")[2] for number in range(store.document_count)}
            for store in (TokenStore(tmp_path / "tokens", split), TokenStore(tokens, split))
        )
        assert 0 < len(before) < len(after)
        assert before <= after


def test_shards_hold_at_most_the_text_asked_for(config, tokens):
    shards = [shard for split in ("train", "held_out") for shard in TokenStore(tokens, split).shards]
    assert len(shards) > 6
    assert max(shard["tokens"] - 2 * shard["documents"] for shard in shards) <= config.shard_bytes


def test_chunk_shards_are_bounded_and_documents_go_on_across_them(tokens, autoencoder, tmp_path, monkeypatch):
    rows = 150
    build_chunks(tokens, autoencoder, tmp_path / "whole")
    monkeypatch.setattr(chunk_stores, "SHARD_ROWS", rows)
    build_chunks(tokens, autoencoder, tmp_path / "cut")
    whole, cut = (ChunkStore(tmp_path / name, "held_out") for name in ("whole", "cut"))
    assert max(shard["rows"] for shard in cut.shards) == rows
    assert len(cut.shards) > len(whole.shards)
    assert cut.document_count == whole.document_count
    for counted in ("rows", "tokens", "documents"):
        assert cut.manifest["splits"]["held_out"][counted] == whole.manifest["splits"]["held_out"][counted]
    for name, values in whole.read(0, len(whole), ("tokens", "mean", "log_std")).items():
        np.testing.assert_allclose(cut.read(0, len(cut), (name,))[name], values, rtol=2e-3, atol=1e-4)
    assert np.array_equal(cut.document_ids(0, len(cut)), whole.document_ids(0, len(whole)))
    for number in range(whole.document_count):
        assert cut.document_name(number) == whole.document_name(number)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 9), st.integers(0, 4))
def test_pieces_of_a_shard_hold_its_documents(lengths, k, rows, skipped):
    offsets = np.maximum(np.cumsum([0, *lengths]) - skipped, 0)
    count = -(-offsets[-1] // k)
    found, begun = [], 0
    for begin in range(0, max(count, 1), rows):
        document, inside, continues = documents_of(-(-offsets // k), range(begin, min(begin + rows, count)))
        assert inside.start == begun - continues  # none is missed, and only one that continues appears twice
        found += [inside[number] for number in document]
        begun = inside.stop
    assert begun == len(lengths)
    assert found == [int(np.searchsorted(offsets, row * k, side="right")) - 1 for row in range(count)]


READING = """
import sys
from calm_core.data.store import TokenStore
store = TokenStore(sys.argv[1], "train")
print(len(store.read(0, 5, ("tokens",))["tokens"]), store.document(4) != "", "pandas" in sys.modules)
"""


def test_reading_a_store_does_not_import_pandas(tokens):
    done = subprocess.run([sys.executable, "-c", READING, str(tokens)], capture_output=True, text=True, check=True)
    assert done.stdout == "5 True False\n"


def test_rows_are_read_across_shards(tokens):
    store = TokenStore(tokens, "train")
    whole = all_tokens(store)
    draw = np.random.default_rng(0)
    for start in draw.integers(0, len(store) - 1, 50):
        count = int(draw.integers(0, len(store) - start + 1))
        assert np.array_equal(store.read(int(start), count, ("tokens",))["tokens"], whole[start : start + count])
    with pytest.raises(IndexError):
        store.read(len(store), 1, ("tokens",))


def test_counts_are_those_of_the_tokens(tokens, tokenizer):
    store = TokenStore(tokens, "train")
    whole = all_tokens(store)
    assert np.array_equal(store.token_counts(), np.bincount(whole, minlength=tokenizer.vocab_size))
    assert np.array_equal(store.token_counts(2500), np.bincount(whole[:2500], minlength=tokenizer.vocab_size))


def test_chunks_are_the_tokens_and_their_latents(tokens, chunks, autoencoder):
    for split in ("train", "held_out"):
        token_store, store = TokenStore(tokens, split), ChunkStore(chunks, split)
        text, pad = all_tokens(token_store), store.manifest["pad"]
        found = store.read(0, len(store), ("tokens", "mean", "log_std"))
        assert np.array_equal(found["tokens"].ravel(), np.append(text, [pad] * (-len(text) % 4)))
        assert store.manifest["splits"][split]["tokens"] == len(text)
        with torch.no_grad():
            mean, log_std = autoencoder.encode(torch.from_numpy(found["tokens"].astype(np.int64)))
        np.testing.assert_allclose(found["mean"], mean.numpy(), rtol=2e-3, atol=1e-5)
        np.testing.assert_allclose(found["log_std"], log_std.numpy(), rtol=2e-3, atol=1e-5)
        assert found["mean"].dtype == np.float16


def test_a_chunk_belongs_to_the_document_of_its_first_token(tokens, chunks):
    token_store, store = TokenStore(tokens, "train"), ChunkStore(chunks, "train")
    assert any(shard["tokens"] % 4 for shard in token_store.shards)  # chunks lie across shards
    ids = token_store.document_ids(0, len(token_store))[::4]
    assert np.array_equal(store.document_ids(0, len(store)), ids)
    assert store.document(0) == token_store.document(0)
    assert store.document_count == token_store.document_count


def test_reading_rows_opens_no_file_of_documents(built_chunks, monkeypatch):
    opened = []
    monkeypatch.setattr("calm_core.data.store.read_shard", lambda path: opened.append(path.name) or read_shard(path))
    store = ChunkStore(built_chunks, "train")
    store.read(0, len(store), store.columns)
    assert opened == [shard["file"] for shard in store.shards]
    store.document(0)
    store.document(0)
    assert opened[len(store.shards) :] == [store.shards[0]["sidecar"]["file"]]


@pytest.mark.parametrize("k", [1, 2, 4, 8, 64])
def test_shards_change_no_chunk(config, tokenizer, autoencoder_of, tmp_path, k):
    """Even where a shard has fewer tokens than a chunk."""
    texts = ["a", "", "b c", *("word " * n for n in range(1, 30)), "z"]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stores = []
    for name, shard_bytes in (("one", 1 << 20), ("many", 1)):
        data = replace(config, corpus=[str(tmp_path / "corpus.jsonl")], held_out=0.0, shard_bytes=shard_bytes)
        build_tokens(data, tokenizer, tmp_path / name / "tokens")
        autoencoder = autoencoder_of(tokenizer, k)
        build_chunks(tmp_path / name / "tokens", autoencoder, tmp_path / name / "chunks")
        assert not list(faults(tmp_path / name / "chunks"))
        stores += [
            ChunkStore(tmp_path / name / "chunks", "train"),
            EncodedStore(tmp_path / name / "tokens", "train", autoencoder),
        ]
    one, _, many, _ = stores
    assert len(one.shards) == 1
    assert len(many.shards) > 20
    for store in stores:
        assert len(store) == len(one)
        assert store.document_count == one.document_count
        assert np.array_equal(all_tokens(store), all_tokens(one))
        assert np.array_equal(store.document_ids(0, len(one)), one.document_ids(0, len(one)))
        assert [store.document_name(number) for number in range(store.document_count)] == [
            one.document_name(number) for number in range(one.document_count)
        ]


def test_padding_fills_the_last_chunk():
    tokens = np.arange(1, 10, dtype=np.uint16)
    offsets = np.array([0, 9])
    assert chunked(tokens, offsets, 4, 0, "pack").tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 0, 0, 0]]
    assert chunked(tokens[:8], offsets - [0, 1], 4, 0, "pack").tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_plain_arrow_and_pandas_open_the_stores(tokens, chunks):
    with pa.memory_map(str(tokens / "train-00000-00000.arrow")) as source:
        frame = pa.ipc.open_file(source).read_pandas()
    assert frame["document"][0].endswith(".jsonl:1")
    assert frame["tokens"][0][0] == 1
    assert frame["tokens"][0][-1] == 2
    frame = pandas.read_feather(chunks / "train-00000-00000.arrow")
    store = ChunkStore(chunks, "train")
    assert np.array_equal(np.stack(frame["mean"]), store.shard(0).columns["mean"])
    sidecar = pandas.read_feather(chunks / "train-00000-00000.documents.arrow")
    assert sidecar["document"][frame["document"][3]] == store.document(3)
    assert sidecar["chunks"].sum() == len(frame)


@pytest.mark.parametrize("verify", ["full", "auto"])
def test_flipped_byte_is_named(chunks, verify):
    path = chunks / "train-00001-00000.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00001-00000\.arrow has changed"):
        ChunkStore(chunks, "train", verify)
    ChunkStore(chunks, "train", "size")
    ChunkStore(chunks, "held_out")


@pytest.mark.parametrize("name", ["train-00001-00000.arrow", "train-00002-00000.documents.arrow"])
def test_truncated_and_missing_shards_are_named(chunks, name):
    path = chunks / name
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=rf"{name} has \d+ bytes"):
        ChunkStore(chunks, "train", "size")
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        ChunkStore(chunks, "train", "size")


def test_wrong_k_autoencoder_kind_and_split_are_refused(tokens, chunks):
    store = ChunkStore(chunks, "train")
    store.require(4, "an autoencoder")
    with pytest.raises(UserError, match=r"data\.k=8"):
        store.require(8, "an autoencoder")
    with pytest.raises(UserError, match="another one"):
        store.require(4, "another one")
    with pytest.raises(UserError, match="store of tokens, not of chunks"):
        ChunkStore(tokens, "train")
    with pytest.raises(UserError, match="no validation documents"):
        TokenStore(tokens, "validation")
    with pytest.raises(UserError, match="no finished store"):
        TokenStore(tokens / "nowhere", "train")


def test_latents_beyond_float16_are_refused(tokens, autoencoder, tmp_path):
    autoencoder.encoder_posterior.bias.data[0] = 70_000.0
    with pytest.raises(UserError, match=r"mean is .* beyond float16"):
        build_chunks(tokens, autoencoder, tmp_path / "chunks")
    autoencoder.encoder_posterior.bias.data[0] = float("nan")
    with pytest.raises(UserError, match="mean is nan"):
        build_chunks(tokens, autoencoder, tmp_path / "chunks")


def test_autoencoder_of_another_tokenizer_is_refused(tokens, autoencoder, tmp_path):
    autoencoder.tokenizer_hash = "another"
    with pytest.raises(UserError, match="tokenizer another"):
        build_chunks(tokens, autoencoder, tmp_path / "chunks")
    assert not (tmp_path / "chunks").exists()


def test_windows_share_one_row_and_cover_the_split(chunks):
    store = ChunkStore(chunks, "train")
    windows = Windows(store, positions=7)
    whole = store.read(0, len(store), ("tokens", "mean"))
    assert len(windows) == (len(store) - 1) // 7
    chosen = np.array([3, 0, len(windows) - 1])
    batch = read_batch(windows, chosen, chosen, ("tokens", "mean"))
    assert batch.tokens.shape == (3, 8, 4)
    assert batch.tokens.dtype == torch.int64
    for sample, window in enumerate(chosen):
        rows = slice(window * 7, window * 7 + 8)
        assert np.array_equal(batch.tokens[sample], whole["tokens"][rows])
        assert np.array_equal(batch.mean[sample], whole["mean"][rows])
        ids = store.document_ids(window * 7, 8)
        assert np.array_equal(windows.document_ids(chosen)[sample], ids)
        assert windows.documents(window) == [store.document_name(number) for number in np.unique(ids)]


def test_windows_of_a_token_store(tokens):
    store = TokenStore(tokens, "train")
    batch = read_batch(Windows(store, positions=16), np.array([5]), np.array([0]), ("tokens",))
    assert np.array_equal(batch.tokens[0, :, 0], all_tokens(store)[80:97])


def test_window_longer_than_the_split_is_refused(tokens):
    store = TokenStore(tokens, "train")
    with pytest.raises(UserError, match="shorter window"):
        Windows(store, positions=len(store))
    assert len(Windows(store, positions=len(store) - 1)) == 1


def test_wide_vocabularies_are_stored_as_int32(config, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", 100_000)
    build_tokens(config, tokenizer, tmp_path / "tokens")
    assert all_tokens(TokenStore(tmp_path / "tokens", "train")).dtype == np.int32


def change_a_digit(folder, keep_checksum):
    manifest = read_json(folder / MANIFEST)
    manifest["splits"]["train"]["shards"][0]["rows"] -= 1
    if not keep_checksum:
        manifest.pop(CHECKSUM)
    write_json(folder / MANIFEST, manifest)


def test_a_changed_digit_in_a_manifest_is_noticed(chunks):
    change_a_digit(chunks, keep_checksum=True)
    with pytest.raises(UserError, match=r"manifest\.json has changed since it was written"):
        ChunkStore(chunks, "train")


def test_a_manifest_without_checksum_is_compared_with_its_shards(chunks):
    change_a_digit(chunks, keep_checksum=False)
    store = ChunkStore(chunks, "train")
    with pytest.raises(UserError, match=r"train-00000-00000\.arrow has [\d,]+ rows, but its manifest says"):
        store.read(0, 1, ("tokens",))


def test_the_checksum_of_a_manifest_is_the_hash_that_it_has_without_one(chunks):
    manifest = read_json(chunks / MANIFEST)
    before = store_hash(chunks)
    assert manifest.pop(CHECKSUM) == before
    write_json(chunks / MANIFEST, manifest)
    assert store_hash(chunks) == before
    assert read_manifest(chunks, "chunks") == manifest


@pytest.mark.parametrize("shards", [3, 30, 300])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_ranks_share_the_verification_of_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, ranks: int
) -> None:
    """All ranks together ask for each file once, however many they are."""
    entries = [{"file": f"{number}.arrow", "bytes": 5, "checksum": ""} for number in range(shards)]
    for entry in entries:
        (tmp_path / entry["file"]).write_bytes(b"12345")
    asked: list[Path] = []
    size_of = store_module._size
    monkeypatch.setattr(store_module, "_size", lambda path: asked.append(path) or size_of(path))
    for rank in range(ranks):
        before = len(asked)
        verify_shards(tmp_path, entries, "size", slice(rank, None, ranks))
        assert len(asked) - before in (shards // ranks, -(-shards // ranks))
    assert len(asked) == len(set(asked)) == shards
    (tmp_path / entries[-1]["file"]).write_bytes(b"")
    last = (shards - 1) % ranks
    with pytest.raises(UserError, match="has 0 bytes instead of 5"):
        verify_shards(tmp_path, entries, "size", slice(last, None, ranks))


def test_shares_of_token_counts_add_up(tokens: Path) -> None:
    store = TokenStore(tokens, "train")
    parts = [store.token_counts(share=slice(rank, None, 3)) for rank in range(3)]
    assert np.array_equal(sum(parts), store.token_counts())
