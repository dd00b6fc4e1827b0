import gzip
import json
import lzma
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_core.data.corpus import Source, sources
from calm_core.data.records import Record, blocks, parts, records
from calm_core.errors import UserError

LINES = "".join(json.dumps({"id": number, "text": "naïve 😀"}) + "\n" for number in range(4)).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSIONS = [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)]


def read(path, text_field="text") -> list[Record]:
    return list(records(Source(path, path.name), text_field))


@pytest.mark.parametrize(("suffix", "compress"), [("", bytes), *COMPRESSIONS])
def test_json_lines_in_each_compression(tmp_path, suffix, compress):
    path = tmp_path / f"part.jsonl{suffix}"
    path.write_bytes(compress(LINES))
    found = read(path)
    assert b"".join(record.content for record in found) == LINES
    assert [record.name for record in found] == [f"part.jsonl{suffix}:{n}" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSIONS)
def test_two_compressed_files_put_together_are_read_to_the_end(tmp_path, suffix, compress):
    path = tmp_path / f"two.jsonl{suffix}"
    path.write_bytes(compress(LINES) + compress(LINES))
    assert len(read(path)) == 8


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSIONS)
def test_truncated_file_is_named(tmp_path, suffix, compress):
    path = tmp_path / f"part.jsonl{suffix}"
    path.write_bytes(compress(LINES)[:-20])
    with pytest.raises(UserError, match=rf"part\.jsonl\{suffix} cannot be read to its end"):
        read(path)


@pytest.mark.parametrize(
    "column", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_parquet(tmp_path, column):
    path = tmp_path / "part.parquet"
    texts = ["one\r\n", None, "", "naïve 😀 \0"]
    pq.write_table(pa.table({"body": pa.array(texts).cast(column), "id": range(4)}), path)
    found = read(path, "body")
    assert [record.content for record in found] == [text if text is None else text.encode() for text in texts]
    assert found[3].name == "part.parquet:4"
    with pytest.raises(UserError, match=r"part\.parquet has no column 'text': set data\.text_field"):
        read(path)
    with pytest.raises(UserError, match=r"'id' of .*part\.parquet holds no text"):
        read(path, "id")


def test_a_text_file_is_one_record_with_every_byte(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"one\r\ntwo\xff\n")
    assert read(tmp_path / "x.txt") == [("x.txt", "text", b"one\r\ntwo\xff\n")]


def test_small_files_join_into_parts_and_large_ones_stand_alone(tmp_path):
    for name, size in {"a": 4, "b": 5, "c": 3, "d": 30, "e": 10, "f": 0}.items():
        (tmp_path / f"{name}.txt").write_bytes(b"x" * size)
    found = parts(sources([f"{tmp_path}/*.txt"]), block_bytes=10)
    assert [[source.name[0] for source in part] for part in found] == [["a", "b"], ["c"], ["d"], ["e", "f"]]


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 40))
def test_blocks_hold_the_records_in_order_and_at_most_their_bytes(tmp_path_factory, sizes, limit):
    path = tmp_path_factory.mktemp("blocks") / "part.jsonl"
    path.write_bytes(b"".join(b"x" * size + b"\n" for size in sizes))
    found = list(blocks(7, [Source(path, path.name)], "text", limit))
    assert [record for block in found for record in block.records] == read(path)
    assert [(block.part, block.piece) for block in found] == [(7, piece) for piece in range(len(found))]
    assert [block.last for block in found] == [False] * (len(found) - 1) + [True]
    for block, following in pairwise(found):
        assert block.bytes <= limit or len(block.records) == 1
        assert block.bytes + len(following.records[0].content) > limit
