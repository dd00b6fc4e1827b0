from hypothesis import given, settings
from hypothesis import strategies as st

from calm_core.inference.request import TextStream
from calm_core.tokenizer import Tokenizer


def pieces(stream: TextStream, tokens: list[int], size: int) -> list[str]:
    taken = []
    for start in range(0, len(tokens), size):
        stream.add(tokens[start : start + size])
        taken.append(stream.take(last=stream.stopped))
        if stream.stopped:
            return taken
    return [*taken, stream.take(last=True)]


def test_characters_come_whole(spoken: Tokenizer) -> None:
    tokens = spoken.encode("x🦊y")  # bytes: the tokenizer has not seen it
    assert len(tokens) > 5
    assert [piece for piece in pieces(TextStream(spoken, [], ()), tokens, 1) if piece] == ["x", "🦊", "y"]


def test_what_a_stop_text_may_begin_with_is_held_back(spoken: Tokenizer) -> None:
    stream = TextStream(spoken, [], ("\n\nQ:",))
    stream.add(spoken.encode("yes\n\n"))
    assert stream.take() == "yes"
    stream.add(spoken.encode("no"))
    assert stream.take() == "\n\nno"
    stream.add(spoken.encode("\n\nQ: more"))
    assert (stream.stopped, stream.take(), stream.text) == (True, "", "yes\n\nno")
    assert spoken.decode(stream.tokens).endswith("Q:")


def test_overlapping_stop_texts_end_the_text_where_the_first_is_complete(spoken: Tokenizer) -> None:
    for size in (1, 3):
        stream = TextStream(spoken, [], ("e", " ee"))
        assert "".join(pieces(stream, spoken.encode("x ee"), size)) == "x "


@settings(deadline=None)
@given(data=st.data(), text=st.text(alphabet="the fox\n😀é", max_size=30), size=st.integers(1, 5))
def test_pieces_are_the_text_up_to_the_first_stop(spoken: Tokenizer, data: st.DataObject, text: str, size: int) -> None:
    stop = data.draw(st.lists(st.text(alphabet="the fo", min_size=1, max_size=4), max_size=2))
    before, tokens = spoken.encode("the dog"), spoken.encode(text)
    stream = TextStream(spoken, before[-1:], stop)
    taken = pieces(stream, tokens, size)
    expected, count, stopped = text, len(tokens), False
    for end in range(len(tokens) + 1):  # the first token that completes a stop text decides, however many come at once
        so_far = spoken.decode([*before, *tokens[:end]]).removeprefix("the dog")
        if found := [at for at in map(so_far.find, stop) if at >= 0]:
            expected, count, stopped = so_far[: min(found)], end, True
            break
    assert "".join(taken) == stream.text == expected
    assert (len(stream.tokens), stream.stopped) == (count, stopped)
    assert stopped == any(one in text for one in stop)


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, 299), max_size=20), size=st.integers(1, 4))
def test_pieces_of_any_tokens_are_their_text(spoken: Tokenizer, tokens: list[int], size: int) -> None:
    stream = TextStream(spoken, [], ())
    assert "".join(pieces(stream, tokens, size)) == stream.text == spoken.decode(tokens)
