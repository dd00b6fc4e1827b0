import pytest

from calm_core.errors import UserError
from calm_core.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"no model", "is not a tokenizer: name a sentencepiece .model, a tokenizer.json or a tiktoken rank file"),
        (b"", "has no bos or no eos"),
        (b'{"version": "1.0"', "not a readable tokenizer.json"),
        (b'{"version": "1.0"}', "not a readable tokenizer.json"),
        (b"IQ== 0\nIg== 1\n", "2 ranks, of no known tokenizer"),
        (b"IQ== 0\nIg==\n", "damaged tiktoken rank file"),
    ],
    ids=range(6),
)
def test_what_is_no_tokenizer_is_refused(tmp_path, content, sentence):
    (tmp_path / "some.model").write_bytes(content)
    with pytest.raises(UserError, match=rf"some\.model .*{sentence}"):
        load_tokenizer(tmp_path / "some.model")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.model", tmp_path):
        with pytest.raises(UserError, match=f"Cannot read the tokenizer {path}"):
            load_tokenizer(path)
