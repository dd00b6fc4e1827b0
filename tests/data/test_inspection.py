import runpy
from pathlib import Path

import numpy as np
import pytest

from calm_core.autoencoder_artefact import save_autoencoder
from calm_core.data.inspection import side_by_side, statistics
from calm_core.data.store import ChunkStore, TokenStore

SCRIPT = Path(__file__).parents[2] / "data_prep" / "inspect_chunks.py"


def test_statistics_are_those_of_the_rows(built_chunks, tokens):
    store = ChunkStore(built_chunks, "train")
    found = statistics(store)
    rows = store.read(0, len(store), ("tokens", "log_std"))
    assert found["rows"] == len(store)
    assert found["tokens_used"] == len(np.unique(rows["tokens"]))
    pads = -len(TokenStore(tokens, "train")) % 4
    assert found["pad_share"] == pytest.approx(pads / rows["tokens"].size)
    assert found["sigma"][0] == pytest.approx(np.exp(rows["log_std"].min().astype(np.float32)), rel=1e-5)
    assert found["document_chunks"][-1] == np.bincount(store.document_ids(0, len(store))).max()


def test_differences_are_marked_line_by_line():
    left, right = ["one ", "two\n", "three", "four"], ["one ", "two\n", "thred", "four"]
    assert list(side_by_side(left, right, 19)) == [
        "one two⏎   one two⏎",
        "three    | thred",
        "four       four",
    ]


def test_a_store_is_shown_beside_its_reconstruction(
    tokens, chunks, autoencoder, tokenizer_path, tmp_path, monkeypatch, capsys
):
    autoencoder.content_hash = save_autoencoder(autoencoder, tmp_path / "frozen", autoencoder.tokenizer_hash, {})
    manifest = chunks / "manifest.json"
    manifest.write_text(manifest.read_text().replace("an autoencoder", autoencoder.content_hash))
    options = ["--tokenizer", tokenizer_path, "--autoencoder", tmp_path / "frozen", "--chunks", "8"]
    monkeypatch.setattr("sys.argv", ["inspect_chunks.py", str(chunks), *map(str, options)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    store = ChunkStore(chunks, "held_out")
    assert f"{len(store):,} chunks of 4 tokens, {store.document_count:,} documents" in out
    assert "sigma " in out
    assert f"{store.document(0)}, from chunk 0:" in out
    assert "% of these tokens" in out
    for line in out.splitlines()[-6:]:
        assert len(line) < 120
