"""What a document is: the one place that says how everything odd in a corpus is treated.

| in the corpus | what becomes of it | counted as |
|---|---|---|
| a text | a document, to the last character: spaces, CRLF, NUL bytes and a byte order mark are part of it | kept |
| bytes that are not UTF-8 | each bad sequence becomes U+FFFD; the document is kept | kept, repaired |
| half of a surrogate pair (JSON can spell one) | becomes U+FFFD; the document is kept | kept, repaired |
| an empty text, a blank line | left out | empty |
| a line that is no JSON object, or has no string in `data.text_field`; a null of a parquet file | left out, the first ones shown; above a share of `data.max_malformed` the work stops | malformed |
| a file that ends in the middle of its compression | the work stops | |

Every record is one of kept, empty and malformed. The size of a document is bounded by memory alone: about six times
its length while it is read and tokenized.
"""  # noqa: E501

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from calm_core.data.records import Record
from calm_core.errors import UserError

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
