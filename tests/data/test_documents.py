import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_core.data.documents import Tally, documents
from calm_core.data.records import Record
from calm_core.errors import UserError


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
