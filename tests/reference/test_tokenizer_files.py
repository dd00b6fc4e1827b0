"""Exported tokenizers, read by transformers, give the tokens and the texts that ours give."""

import io
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from launching import ROOT
from transformers import AutoTokenizer

from calm_core.reference.tokenizer_files import export_tokenizer
from calm_core.tokenizer import load_tokenizer

TRAINED = ROOT / "tests" / "fixtures" / "old_run" / "tokenizer" / "tokenizer.model"
LLAMA_3 = Path(find_spec("llama_models").origin).with_name("llama3") / "tokenizer.model"
TEXTS = [
    (ROOT / "README.md").read_text(),
    (ROOT / "calm_core" / "io.py").read_text(),
    "the texts <s>, </s>, <pad>, <|pad|> and <|begin_of_text|> are no control tokens",
    "\t\n  Größe 中文 😀\u200d👩 \u0000 ~~~~~~~~~~~~ 1234567890",
]


def assert_alike(source: Path, target: Path, first: list[int]) -> None:
    ids = export_tokenizer(source, target)
    ours, theirs = load_tokenizer(source), AutoTokenizer.from_pretrained(target)
    assert ids == {f"{name}_token_id": getattr(ours, name) for name in ("bos", "eos", "pad")}
    assert ids == {name: getattr(theirs, name) for name in ids}
    assert len(theirs) == ours.vocab_size
    for text in TEXTS:
        tokens = ours.encode(text)
        assert theirs(text).input_ids == first + tokens
        assert theirs.decode([*first, *tokens, ours.eos], skip_special_tokens=True) == ours.decode(tokens)


def test_a_tokenizer_trained_here(tmp_path: Path) -> None:
    assert_alike(TRAINED, tmp_path, [1])
    assert (tmp_path / "tokenizer.model").read_bytes() == TRAINED.read_bytes()


@pytest.mark.slow
def test_llama_3(tmp_path: Path) -> None:
    assert_alike(LLAMA_3, tmp_path, [128_000])


def trained(folder: Path, **settings: object) -> Path:
    model, path = io.BytesIO(), folder / "some.model"
    words = [f"word{number % 97} and others {number}" for number in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, byte_fallback=True, minloglevel=2, **settings
    )
    path.write_bytes(model.getvalue())
    return path


def test_a_byte_pair_encoding_with_a_space_before_the_text(tmp_path: Path) -> None:
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    path = trained(tmp_path, model_type="bpe", vocab_size=320, **settings)
    assert_alike(path, tmp_path / "out", [1])


def test_a_file_that_cannot_be_converted_is_copied_alone(tmp_path: Path) -> None:
    path = trained(tmp_path, model_type="unigram", vocab_size=320)
    export_tokenizer(path, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["tokenizer.model"]


def test_a_tokenizer_json_is_copied_with_the_names_of_its_control_tokens(tmp_path: Path) -> None:
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXTS, vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False)
    source = tmp_path / "in" / "tokenizer.json"
    source.parent.mkdir()
    tokenizer.save(str(source))
    assert_alike(source, tmp_path / "out", [])
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["pad_token"] == "<|pad|>"
    (source.parent / "tokenizer_config.json").write_text('{"eos_token": "</s>", "tokenizer_class": "GPT2Tokenizer"}')
    export_tokenizer(source, tmp_path / "named")
    assert json.loads((tmp_path / "named" / "tokenizer_config.json").read_text())["tokenizer_class"] == "GPT2Tokenizer"
