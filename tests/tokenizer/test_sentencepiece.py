import io
from functools import partial

import pytest
import sentencepiece

from calm_core.errors import UserError
from calm_core.tokenizer import load_tokenizer
from calm_core.tokenizer.base import encode_long


def model(texts: list[str], **options) -> bytes:
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=content,
        vocab_size=600,
        max_sentence_length=1 << 20,
        minloglevel=2,
        **{"byte_fallback": True, **options},
    )
    return content.getvalue()


@pytest.fixture(scope="module")
def foreign(slice_of_text) -> bytes:
    """A model of the library's own settings: a space is put before any text, and characters are normalised."""
    return model(slice_of_text[:4], model_type="bpe", remove_extra_whitespaces=False)


def test_tokens_are_those_of_the_library(foreign, slice_of_text, tmp_path):
    (tmp_path / "t.model").write_bytes(foreign)
    tokenizer, library = load_tokenizer(tmp_path / "t.model"), sentencepiece.SentencePieceProcessor(model_proto=foreign)
    wanted = library.encode(slice_of_text)
    assert [tokenizer.encode(text) for text in slice_of_text] == wanted
    assert [ids.tolist() for ids in tokenizer.encode_batch(slice_of_text)] == wanted
    assert [tokenizer.decode(ids) for ids in wanted] == library.decode(wanted)
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (600, library.bos_id(), library.eos_id())
    assert tokenizer.pad == library.unk_id()


def test_tokens_of_a_long_text_are_those_of_the_whole(foreign, slice_of_text):
    library = sentencepiece.SentencePieceProcessor(model_proto=foreign)
    text = " ".join(slice_of_text)
    encode = partial(library.encode, return_type="numpy")
    assert encode_long(encode, text, longest=300).tolist() == library.encode(text)


def test_a_model_without_eos_is_refused(slice_of_text, tmp_path):
    (tmp_path / "t.model").write_bytes(model(slice_of_text[:2], model_type="bpe", eos_id=-1))
    with pytest.raises(UserError, match=r"t\.model has no bos or no eos"):
        load_tokenizer(tmp_path / "t.model")


def test_characters_without_a_token_are_not_pad(slice_of_text, tmp_path):
    content = model(slice_of_text[:4], model_type="unigram", byte_fallback=False)
    (tmp_path / "t.model").write_bytes(content)
    tokenizer, library = load_tokenizer(tmp_path / "t.model"), sentencepiece.SentencePieceProcessor(model_proto=content)
    text = "naïve — 日本語"
    assert library.unk_id() in library.encode(text)  # the case is one
    assert tokenizer.encode(text) == library.encode(text)
    assert (tokenizer.pad, tokenizer.vocab_size) == (600, 601)
    assert tokenizer.decode([*tokenizer.encode("a word"), tokenizer.pad]) == "a word"
