import io
from functools import partial
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from calm_core.config.data_config import TokenizerConfig
from calm_core.errors import UserError
from calm_core.tokenizer import Tokenizer, encode_long, load_tokenizer
from calm_core.tokenizer.sentencepiece import is_trained, train_tokenizer


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


TEXT = [
    f"The year {year} was good;\n\nthe next one, {year + 1},  was better.\tSo it goes — naïve." for year in range(500)
]
CONFIG = TokenizerConfig(vocab_size=350)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXT, CONFIG, path, {"corpus": "years"})
    return path


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(path)


# sentencepiece writes its spaces as U+2581, so that character alone does not come back.
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_decoding_gives_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["  two  spaces ", "\ttab\r\n\n\n", "\0", "<s></s><pad><unk><0x0A>", "\ufeff😀\u200d é"]
)
def test_decoding_gives_back_awkward_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert min(ids) > 3  # text never encodes to a special token


def test_special_tokens_come_first_and_are_silent(tokenizer):
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos) == (0, 1, 2)
    assert tokenizer.decode([1, *tokenizer.encode("a year"), 2, 0, 0]) == "a year"


def test_batch_equals_one_by_one(tokenizer):
    batch = tokenizer.encode_batch(TEXT[:50])
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in TEXT[:50]]


def test_learns_pieces_and_splits_digits(tokenizer):
    assert tokenizer.vocab_size == 350
    assert len(tokenizer.encode(TEXT[0])) < len(TEXT[0]) / 2
    assert len(tokenizer.encode("2048")) == 4


def test_training_is_deterministic(path, tmp_path):
    again = train_tokenizer(TEXT, CONFIG, tmp_path / "tokenizer.model", {})
    assert again.content_hash == load_tokenizer(path).content_hash
    assert (tmp_path / "tokenizer.model").read_bytes() == path.read_bytes()


def test_too_large_a_vocabulary_names_the_largest(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer.vocab_size=5000 .* at most \d+") as error:
        train_tokenizer(TEXT, TokenizerConfig(vocab_size=5000), tmp_path / "tokenizer.model", {})
    assert not list(tmp_path.iterdir())
    largest = int(str(error.value).split("at most ")[1].split()[0])
    assert train_tokenizer(TEXT, TokenizerConfig(largest), tmp_path / "t.model", {}).vocab_size == largest


def test_too_small_a_vocabulary_names_the_smallest(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer.vocab_size=265 .* at least \d+"):
        train_tokenizer(TEXT, TokenizerConfig(vocab_size=265), tmp_path / "tokenizer.model", {})


def test_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.corpus"):
        train_tokenizer(["", ""], CONFIG, tmp_path / "tokenizer.model", {})


def test_trained_is_known_by_its_inputs(path, tmp_path):
    assert is_trained(path, {"corpus": "years"})
    assert not is_trained(tmp_path / "tokenizer.model", {"corpus": "years"})
    with pytest.raises(UserError, match="another corpus"):
        is_trained(path, {"corpus": "months"})
    foreign = tmp_path / "foreign.model"
    foreign.write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="not trained here"):
        is_trained(foreign, {"corpus": "years"})
