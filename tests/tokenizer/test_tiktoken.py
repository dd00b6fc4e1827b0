"""Llama 3's tokenizer, read from the installed package that publishes it."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from llama_models.llama3.tokenizer import Tokenizer as Original

from calm_core.data.store import token_dtype
from calm_core.tokenizer import load_tokenizer

PATH = Path(find_spec("llama_models").origin).with_name("llama3") / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(PATH)


@pytest.fixture(scope="module")
def original() -> Original:
    return Original(PATH)


def test_tokens_are_those_of_the_original(tokenizer, original, slice_of_text):
    wanted = [original.encode(text, bos=False, eos=False) for text in slice_of_text]
    assert [tokenizer.encode(text) for text in slice_of_text] == wanted
    assert [ids.tolist() for ids in tokenizer.encode_batch(slice_of_text)] == wanted
    assert [tokenizer.decode(ids) for ids in wanted] == [original.decode(ids) for ids in wanted] == slice_of_text


@pytest.mark.parametrize(
    "text",
    [
        "a" * 25_000 + " " + "b" * 25_001,
        "word " * 20 + "x" * 60_001 + "  end",
        " " * 50_000 + "a",
        "é\n" * 5 + "\n" * 25_001,
        "ab " * 140_000,
    ],
    ids=range(5),
)
def test_long_texts_are_cut_as_the_original_does(tokenizer, original, text):
    assert tokenizer.encode(text) == original.encode(text, bos=False, eos=False)


def test_special_tokens_follow_the_ranks_and_pad_comes_last(tokenizer, original):
    assert (tokenizer.bos, tokenizer.eos) == (original.bos_id, original.eos_id) == (128_000, 128_001)
    assert (tokenizer.pad, tokenizer.vocab_size) == (original.n_words, original.n_words + 1) == (128_256, 128_257)
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode("a b"), tokenizer.eos, tokenizer.pad]) == "a b"
    assert token_dtype(tokenizer.vocab_size) == "int32"
