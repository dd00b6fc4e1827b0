import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest

from calm_core.autoencoder.model import save_autoencoder
from calm_core.data.store import ChunkStore, TokenStore
from calm_core.data.verification import faults, side_by_side, statistics
from calm_core.errors import UserError
from calm_core.io import CHECKSUM, MANIFEST, read_json, read_manifest, write_json, write_manifest

VERIFY = Path(__file__).parents[2] / "data_prep" / "verify.py"


@pytest.fixture
def copied(tokens, tmp_path) -> Path:
    return Path(shutil.copytree(tokens, tmp_path / "tokens"))


def verify(monkeypatch, *stores) -> int:
    monkeypatch.setattr("sys.argv", ["verify.py", *map(str, stores)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(VERIFY), run_name="__main__")
    return ended.value.code


def test_good_stores_have_no_faults(tokens, chunks, monkeypatch, capsys):
    assert verify(monkeypatch, tokens, chunks) == 0
    out = capsys.readouterr().out
    assert out.count("every checksum and count is correct") == 2
    assert f"{chunks}, held_out: " in out


def test_each_bad_file_is_named(chunks, monkeypatch, capsys):
    names = ["train-00001-00000.arrow", "train-00002-00000.documents.arrow", "held_out-00000-00000.arrow"]
    content = bytearray((chunks / names[0]).read_bytes())
    content[-200] ^= 1
    (chunks / names[0]).write_bytes(content)
    (chunks / names[1]).unlink()
    (chunks / names[2]).write_bytes((chunks / names[2]).read_bytes()[:-1])
    assert verify(monkeypatch, chunks) == 2
    out = capsys.readouterr().out
    assert f"{names[0]} has changed" in out
    assert f"{names[1]} is missing" in out
    assert f"{names[2]} has " in out
    assert "3 faults" in out


@pytest.mark.parametrize("counted", ["rows", "tokens", "documents"])
def test_counts_that_are_not_the_shards_are_named(copied, counted):
    manifest = read_json(copied / MANIFEST)
    manifest["splits"]["train"]["shards"][1][counted] += 1
    manifest.pop(CHECKSUM)
    write_json(copied / MANIFEST, manifest)
    found = list(faults(copied))
    assert len(found) == 2
    assert "train-00001-00000.arrow has" in found[0] or "train-00000-00001.arrow has" in found[0]
    assert f"{counted} instead of" in found[0]
    assert f"sums the {counted} of train wrongly" in found[1]


def test_what_is_no_finished_store_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="no finished store of tokens or chunks"):
        list(faults(tmp_path))
    (tmp_path / MANIFEST).write_text(json.dumps({"kind": "recipes"}))
    assert verify(monkeypatch, tmp_path) == 2
    assert "store of recipes, not of tokens or chunks" in capsys.readouterr().err


INSPECT = Path(__file__).parents[2] / "data_prep" / "inspect_chunks.py"


def test_statistics_are_those_of_the_rows(built_chunks, tokens):
    store = ChunkStore(built_chunks, "train")
    found = statistics(store)
    rows = store.read(0, len(store), ("tokens", "log_std"))
    assert found["rows"] == len(store)
    assert found["tokens_used"] == len(np.unique(rows["tokens"]))
    pads = -len(TokenStore(tokens, "train")) % 4
    assert found["pad_fraction"] == pytest.approx(pads / rows["tokens"].size)
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
    manifest = read_manifest(chunks, "chunks")
    manifest["made_from"]["autoencoder"] = autoencoder.content_hash
    write_manifest(chunks, manifest)
    options = ["--tokenizer", tokenizer_path, "--autoencoder", tmp_path / "frozen", "--chunks", "8"]
    monkeypatch.setattr("sys.argv", ["inspect_chunks.py", str(chunks), *map(str, options)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(INSPECT), run_name="__main__")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    store = ChunkStore(chunks, "held_out")
    assert f"{len(store):,} chunks of 4 tokens, {store.document_count:,} documents" in out
    assert "sigma " in out
    assert f"{store.document(0)}, from chunk 0:" in out
    assert "% of these tokens" in out
    for line in out.splitlines()[-6:]:
        assert len(line) < 120
