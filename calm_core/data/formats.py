"""The formats of corpus files: JSON lines, JSON, parquet and plain text, each but parquet also compressed.

A new format is an entry of `FORMATS`, a new compression one of `COMPRESSIONS`.
"""

import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from calm_core.errors import UserError

BUFFER_BYTES = 1 << 20

PARQUET_BATCH_ROWS = 256

Open = Callable[[Path], IO[bytes]]


@dataclass(frozen=True)
class Format:
    """How the records of a file are read.

    Attributes:
        form: `json` where a record is a JSON object, `text` where it is the text itself.
        whole_file: whether the file is a single record.
        read: yields the records' bytes, given the path, what opens it, and the name of the text field. None is a null.
    """

    form: Literal["json", "text"]
    whole_file: bool
    read: Callable[[Path, Open, str], Iterator[bytes | None]]


def split_ending(name: str) -> tuple[str, str] | None:
    """The format and the compression that a file name ends in, as keys of `FORMATS` and `COMPRESSIONS`."""
    name = name.lower()
    for ending in FORMATS:
        for compression in COMPRESSIONS if ending != ".parquet" else ("",):
            if name.endswith(ending + compression):
                return ending, compression
    return None


def known_endings() -> str:
    """The endings of file names that can be read, for messages."""
    compressed = ", ".join(name for name in FORMATS if name != ".parquet")
    return f"{compressed} (also with {', '.join(name for name in COMPRESSIONS if name)}) and .parquet"


def _open_zstd(path: Path) -> IO[bytes]:
    """Reads across frames, and fails on a truncated one."""
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), BUFFER_BYTES)


def _read_lines(path: Path, open_file: Open, text_field: str) -> Iterator[bytes]:
    with open_file(path) as lines:
        yield from lines


def _read_json(path: Path, open_file: Open, text_field: str) -> Iterator[bytes]:
    """The records of a `.json` file: its lines, or the elements of an array, or one object over several lines."""
    with open_file(path) as file:
        blank_lines = []
        for first in file:
            if first.strip():
                break
            blank_lines.append(first)
        else:
            return
        if _is_json(first) and not first.lstrip().startswith(b"["):
            yield from chain(blank_lines, [first], file)
            return
        content = b"".join([first, *file])
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        yield from io.BytesIO(content)  # malformed records, counted as such
        return
    for record in value if isinstance(value, list) else [value]:
        yield json.dumps(record).encode()


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _read_text(path: Path, open_file: Open, text_field: str) -> Iterator[bytes]:
    with open_file(path) as file:
        yield file.read()


def _read_parquet(path: Path, open_file: Open, text_field: str) -> Iterator[bytes | None]:
    """The bytes of the text column, which may not be valid UTF-8."""
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        if text_field not in schema.names:
            raise UserError(f"{path} has no column {text_field!r}: set data.text_field to the one that holds the text.")
        if schema.names.count(text_field) > 1:
            raise UserError(f"{path} has several columns named {text_field!r}: rename all but one of them.")
        if not _is_text(schema.field(text_field).type):
            raise UserError(f"The column {text_field!r} of {path} holds no text: set data.text_field to one that does.")
        for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=[text_field], use_threads=False):
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            for value in column.cast(pa.large_binary()):
                yield value.as_py()


def _is_text(column: pa.DataType) -> bool:
    if pa.types.is_dictionary(column):
        column = column.value_type
    types = pa.types
    is_binary = types.is_binary(column) or types.is_large_binary(column) or types.is_binary_view(column)
    return is_binary or types.is_string(column) or types.is_large_string(column) or types.is_string_view(column)


_JSON_LINES = Format("json", False, _read_lines)

FORMATS = {
    ".jsonl": _JSON_LINES,
    ".ndjson": _JSON_LINES,
    ".json": Format("json", False, _read_json),
    ".txt": Format("text", True, _read_text),
    ".parquet": Format("text", False, _read_parquet),
}

COMPRESSIONS: dict[str, Open] = {
    "": partial(open, mode="rb", buffering=BUFFER_BYTES),
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
