"""The records of a corpus: its raw content, cut into the blocks that are worked on one at a time.

How a corpus is cut follows from its files alone, so that any number of processes and machines can share the work:

    part      some files in a row: a large one by itself, small ones together; machines share out parts
    block     some records in a row within a part; processes share out blocks, and a block becomes a shard
    record    a line, a row of a parquet file, or a text file
"""

import gzip
import io
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from calm_core.data.corpus import Source
from calm_core.errors import UserError

ROWS_AT_ONCE = 256  # of a parquet file
BUFFER_BYTES = 1 << 20


class Record(NamedTuple):
    """One record as its file holds it."""

    name: str
    """FILE:N with N counted from 1; FILE alone for a text file."""
    form: Literal["json", "text"]
    content: bytes | None
    """A JSON line, or the text itself; None is a null of a parquet file."""


@dataclass(frozen=True)
class Block:
    """Some records in a row: number `piece` of part number `part`, and whether it is the part's last."""

    part: int
    piece: int
    last: bool
    records: list[Record]

    @property
    def bytes(self) -> int:
        """The size of its records."""
        return sum(len(record.content or b"") for record in self.records)


def parts(corpus: Sequence[Source], block_bytes: int) -> list[list[Source]]:
    """The files of the corpus in parts: small ones join until the part has the size of a block."""
    found: list[list[Source]] = []
    room = 0
    for source in corpus:
        size = source.path.stat().st_size
        if not found or size > room:
            found.append([])
            room = block_bytes
        found[-1].append(source)
        room -= size
    return found


def blocks(part: int, files: Iterable[Source], text_field: str, block_bytes: int) -> Iterator[Block]:
    """The records of a part in blocks of at most `block_bytes`; a longer record is a block by itself.

    Raises:
        UserError: naming a file that cannot be read to its end.
    """
    piece, taken, size = 0, [], 0
    for record in chain.from_iterable(records(source, text_field) for source in files):
        length = len(record.content or b"")
        if taken and size + length > block_bytes:
            yield Block(part, piece, False, taken)
            piece, taken, size = piece + 1, [], 0
        taken.append(record)
        size += length
    yield Block(part, piece, True, taken)


def records(source: Source, text_field: str) -> Iterator[Record]:
    """The records of a file, read as they are asked for.

    Raises:
        UserError: naming the file, if it cannot be read to its end or is a parquet file without such a text column.
    """
    path = source.path
    try:
        if path.suffix == ".txt":
            yield Record(source.name, "text", path.read_bytes())
        elif path.suffix == ".parquet":
            for number, content in enumerate(_parquet_texts(path, text_field), 1):
                yield Record(f"{source.name}:{number}", "text", content)
        else:
            with _open_lines(path) as lines:
                for number, line in enumerate(lines, 1):
                    yield Record(f"{source.name}:{number}", "json", line)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read to its end ({error}): replace or remove it.") from error


def _parquet_texts(path: Path, text_field: str) -> Iterator[bytes | None]:
    """The bytes of the text column, which need not be valid UTF-8."""
    with pq.ParquetFile(path) as file:
        if text_field not in file.schema_arrow.names:
            raise UserError(f"{path} has no column {text_field!r}: set data.text_field to the one that holds the text.")
        if not _is_text(file.schema_arrow.field(text_field).type):
            raise UserError(f"The column {text_field!r} of {path} holds no text: set data.text_field to one that does.")
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=[text_field], use_threads=False):
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            for value in column.cast(pa.large_binary()):
                yield value.as_py()


def _is_text(column: pa.DataType) -> bool:
    if pa.types.is_dictionary(column):
        column = column.value_type
    return pa.types.is_string(column) or pa.types.is_large_string(column) or pa.types.is_binary(column)


def _open_lines(path: Path) -> IO[bytes]:
    """A file of lines, decompressed as it is read."""
    match path.suffix:
        case ".gz":
            return gzip.open(path, "rb")
        case ".xz":
            return lzma.open(path, "rb")
        case ".zst":
            # pyarrow's reader goes on across frames and complains of a truncated one; zstandard's does neither.
            return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), BUFFER_BYTES)
        case _:
            return open(path, "rb", BUFFER_BYTES)
