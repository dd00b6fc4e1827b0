import pytest
import torch

from calm_core.config.data_config import DataConfig, TokenizerConfig
from calm_core.data.store import TokenStore
from calm_core.data.tokens import build_tokens
from calm_core.evaluation.ngram import bigram_of
from calm_core.evaluation.words import known_share, words, words_of_bigram, words_of_documents
from calm_core.tokenizer import load_tokenizer
from calm_core.tokenizer.sentencepiece import train_tokenizer


def test_words_are_runs_of_letters_in_lower_case() -> None:
    assert words("The Union's 13 states, über-große: x_y") == ["the", "union", "s", "states", "über", "große", "x", "y"]
    assert words("") == words("1863.", whole=False) == []


def test_a_word_that_may_be_cut_off_is_left_out() -> None:
    assert words("of the Uni", whole=False) == ["of", "the"]
    assert words("of the Union.", whole=False) == ["of", "the", "union"]


def test_the_share_has_an_error_that_counts_texts() -> None:
    share = known_share([["a", "b"], ["a", "a"], ["c", "b"]], frozenset("ab"))
    assert share.share == pytest.approx(5 / 6)
    assert share.words == 6
    assert share.standard_error == pytest.approx(1 / 6)  # of the means 1, 1 and 1/2
    assert share.half_interval == pytest.approx(4.303 / 6, abs=1e-3)  # Student's t with 2 degrees of freedom
    assert known_share([["a", "c"]], frozenset("a")).standard_error is None


def test_the_bigram_table_writes_words_of_the_documents(tmp_path) -> None:
    texts = ["we the people", "the union of the people", "people of the union"] * 20
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(f"{text} {number}")
    train_tokenizer(texts, TokenizerConfig(vocab_size=290), tmp_path / "tokenizer.model", {})
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    build_tokens(DataConfig(corpus=[f"{tmp_path}/*.txt"], held_out=0.0), tokenizer, tmp_path / "tokens")
    store = TokenStore(tmp_path / "tokens", "train")
    known = words_of_documents(store, tokenizer)
    assert known == {"we", "the", "people", "union", "of"}
    found = words_of_bigram(bigram_of(store), tokenizer, 50, 12, 0.5, seed=0)
    assert len(found) == 50
    assert torch.tensor([len(text) for text in found]).float().mean() > 1
    assert known_share(found, known).share > 0.5
