import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from calm_core.errors import UserError
from calm_core.tokenizer import encode_long, load_tokenizer


def byte_level(texts: list[str]) -> tokenizers.Tokenizer:
    """As GPT-2's: one special token, which ends a document."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made


def spaced(texts: list[str]) -> tokenizers.Tokenizer:
    """As Llama 2's: a space is put before any text, bytes stand in for unknown characters, bos is put in front."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=list("<|/>"), show_progress=False),
    )
    made.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.enable_truncation(8)
    return made


KINDS = {"byte_level": byte_level, "spaced": spaced}


@pytest.fixture(scope="module", params=KINDS)
def path(request, slice_of_text, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    KINDS[request.param](slice_of_text[:4]).save(str(path))
    return path


def test_tokens_are_those_of_the_library(path, slice_of_text):
    tokenizer, library = load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    library.no_truncation()
    texts = [text for text in slice_of_text if "<s>" not in text]
    wanted = [library.encode(text, add_special_tokens=False).ids for text in texts]
    assert [tokenizer.encode(text) for text in texts] == wanted
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == wanted
    assert [tokenizer.decode(ids) for ids in wanted] == library.decode_batch(wanted)
    text = " ".join(texts)
    found = encode_long(lambda piece: np.array(tokenizer.encode(piece), np.int32), text, 300)
    assert found.tolist() == tokenizer.encode(text)


def test_text_never_encodes_to_a_special_token(path):
    tokenizer = load_tokenizer(path)
    text = "<s> and </s> and <|endoftext|>"
    ids = tokenizer.encode(text)
    assert not {tokenizer.bos, tokenizer.eos, tokenizer.pad} & set(ids)
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos, tokenizer.pad]) == text
    assert np.max(tokenizer.encode_batch([text])[0]) < tokenizer.vocab_size


def test_special_tokens_by_their_usual_names(path):
    tokenizer = load_tokenizer(path)
    size = tokenizers.Tokenizer.from_file(str(path)).get_vocab_size()
    names = {"byte_level": ("<|endoftext|>", "<|endoftext|>"), "spaced": ("<s>", "</s>")}
    ids = json.loads(path.read_text())["model"]["vocab"]
    assert (tokenizer.bos, tokenizer.eos) == tuple(ids[name] for name in names[path.parent.name[:-1]])
    assert (tokenizer.pad, tokenizer.vocab_size) == (size, size + 1)


def test_special_tokens_by_the_names_beside_the_file(path, tmp_path):
    library = tokenizers.Tokenizer.from_file(str(path))
    library.add_special_tokens(["<end>", "<fill>"])
    library.save(str(tmp_path / "tokenizer.json"))
    names = tmp_path / "tokenizer_config.json"
    ids = library.get_vocab()
    names.write_text(json.dumps({"bos_token": None, "eos_token": {"content": "<end>"}, "pad_token": "<fill>"}))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (ids["<end>"], ids["<end>"], ids["<fill>"])
    names.write_text(json.dumps({"eos_token": "e"}))
    with pytest.raises(UserError, match=r"tokenizer\.json turns the text 'e' into a control token"):
        load_tokenizer(tmp_path / "tokenizer.json")
    names.write_text(json.dumps({"eos_token": "<other>"}))
    with pytest.raises(
        UserError, match=r"names no eos token: put the model's tokenizer_config\.json, which names it, next to it"
    ):
        load_tokenizer(tmp_path / "tokenizer.json")
    names.write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(tmp_path / "tokenizer.json")


def unigram(special: bool) -> tokenizers.Tokenizer:
    """Its control tokens are in the vocabulary of the model, with better scores than the characters have."""
    pieces = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -3.0) for piece in ["▁", *"<s/>ab$10"])]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Metaspace(prepend_scheme="never")
    made.add_tokens([AddedToken(name, special=special, normalized=False) for name in ("<s>", "</s>")])
    return made


def added_token_that_is_not_special() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(["some text"], trainer)
    made.add_tokens([AddedToken("<|endoftext|>", special=False)])
    return made


@pytest.mark.parametrize(
    "make", [lambda: unigram(True), lambda: unigram(False), added_token_that_is_not_special], ids=range(3)
)
def test_text_that_names_a_control_token_is_encoded_as_text(make, tmp_path):
    library = make()
    library.encode_special_tokens = True
    text = "a<s>$10</s> b<|endoftext|>" if "<|endoftext|>" in library.get_vocab() else "a<s>$10</s> b"
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    control = {tokenizer.bos, tokenizer.eos, tokenizer.pad}
    assert control & set(library.encode(text).ids)  # the case is one
    ids = tokenizer.encode(text)
    assert not control & set(ids)
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == text
    assert tokenizer.encode("a b") == library.encode("a b").ids
    assert {library.get_vocab()[name] for name in ("<s>", "</s>", "<|endoftext|>") if name in library.get_vocab()} <= (
        control
    )
