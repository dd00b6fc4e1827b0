"""The split of a corpus into training and held-out text."""

import json
from pathlib import Path

import pytest

from calm_core import config as configuration
from calm_core.config.data_config import DataConfig
from calm_core.config.experiment import Experiment
from calm_core.data.chunks import EncodedStore, build_chunks
from calm_core.data.split import CHARACTERS_PER_TOKEN, HELD_OUT, TRAIN, Split, choose_split, held_out_tokens, split_of
from calm_core.data.store import ChunkStore, TokenStore
from calm_core.data.tokens import TokenStoreBuild, training_texts
from calm_core.io import read_manifest


def words(count: int, seed: int = 0) -> str:
    return " ".join(f"w{(number * 7919 + seed) % 100_003}" for number in range(count))


def corpus(folder: Path, texts: list[str], **settings: object) -> DataConfig:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(corpus=[str(path)], **settings)


@pytest.mark.parametrize("documents", [1, 10, 20])
def test_few_documents_are_split_by_position(tmp_path, documents):
    split = choose_split(corpus(tmp_path, [words(500, seed) for seed in range(documents)]), tokens=10)
    assert split.by == "position"
    assert 0.02 <= split.fraction <= 0.25


def test_many_documents_are_split_by_hash_as_data_held_out_says(tmp_path):
    config = corpus(tmp_path, [words(50, seed) for seed in range(600)], held_out=0.05)
    assert choose_split(config) == choose_split(config, tokens=100) == Split("document", 0.05)


def test_a_large_corpus_is_not_read_to_its_end(tmp_path):
    config = corpus(tmp_path, [words(50, seed) for seed in range(600)], held_out=0.25)
    with open(config.corpus[0], "a") as file:
        file.write("not JSON\n" * 10)
    (tmp_path / "z.parquet").write_text("not parquet")
    assert (
        choose_split(DataConfig(corpus=[*config.corpus, str(tmp_path / "z.parquet")], held_out=0.25)).by == "document"
    )


def test_many_short_documents_hold_out_more_of_themselves(tmp_path):
    texts = [words(20, seed) for seed in range(300)]
    config = corpus(tmp_path, texts)
    wanted = len("".join(texts)) // 10
    split = choose_split(config, wanted // CHARACTERS_PER_TOKEN)
    assert split.by == "document"
    assert 0.05 < split.fraction < 0.2
    held_out = [part.text for text in texts for part in split.parts(text) if part.side == HELD_OUT]
    assert wanted * 0.9 < len("".join(held_out)) < wanted * 1.2


def test_a_quarter_of_the_text_at_most_is_held_out(tmp_path):
    assert choose_split(corpus(tmp_path, [words(50)]), tokens=10**6) == Split("position", 0.25)
    assert choose_split(corpus(tmp_path, [words(5, n) for n in range(300)]), tokens=10**6) == Split("document", 0.25)
    assert choose_split(corpus(tmp_path, [words(50)], held_out=0.4), tokens=10**6) == Split("position", 0.4)
    assert choose_split(corpus(tmp_path, [words(50)], held_out=0.0), tokens=10**6) == Split("document", 0.0)


@pytest.mark.parametrize("text", [words(1000), "x" * 1000, "a", "a b", "one\nline\n" * 30])
def test_positions_begin_and_end_the_document_with_a_gap_between(text):
    parts = Split("position", 0.2).parts(text)
    assert (parts[0].side, parts[0].begins, parts[-1].ends) == (TRAIN, True, True)
    assert text.startswith(parts[0].text)
    assert text.endswith(parts[-1].text)
    if len(parts) == 2:
        train, held_out = parts
        assert (train.ends, held_out.side, held_out.begins) == (False, HELD_OUT, False)
        if len(text) == 1000 and "w" not in text:
            assert (len(held_out.text), len(train.text)) == (200, 750)


@pytest.fixture(scope="module")
def one_document(tmp_path_factory) -> DataConfig:
    return corpus(tmp_path_factory.mktemp("one"), [words(3000)])


def test_windows_of_every_k_see_the_same_held_out_tokens(one_document, tokenizer, autoencoder, tmp_path):
    build = TokenStoreBuild.begin(one_document, tokenizer, tmp_path / "tokens", held_out_tokens=256)
    build.run()
    manifest = build.finish()
    assert manifest["split"] == {"by": "position", "fraction": build.split.fraction}
    assert split_of(read_manifest(tmp_path / "tokens", "tokens")) == build.split
    train, held_out = (TokenStore(tmp_path / "tokens", side) for side in (TRAIN, HELD_OUT))
    assert len(held_out) > 256
    assert train.document_count == held_out.document_count == 1
    read = {store.split: store.read(0, len(store), ("tokens",))["tokens"].tolist() for store in (train, held_out)}
    assert read[TRAIN][0] == tokenizer.bos
    assert tokenizer.eos not in read[TRAIN]
    assert tokenizer.bos not in read[HELD_OUT]
    assert read[HELD_OUT][-1] == tokenizer.eos
    build_chunks(tmp_path / "tokens", autoencoder, tmp_path / "chunks")
    for store in (ChunkStore(tmp_path / "chunks", HELD_OUT), EncodedStore(tmp_path / "tokens", HELD_OUT, autoencoder)):
        tokens = store.read(0, len(store), ("tokens",))["tokens"].reshape(-1).tolist()
        assert tokens[: len(held_out)] == read[HELD_OUT]


def test_a_store_that_was_started_keeps_its_split(one_document, tokenizer, tmp_path):
    first = TokenStoreBuild.begin(one_document, tokenizer, tmp_path / "tokens", held_out_tokens=256)
    first.builder.begin()
    again = TokenStoreBuild.begin(one_document, tokenizer, tmp_path / "tokens", held_out_tokens=9999)
    assert again.split == first.split != choose_split(one_document, 9999)


def test_the_tokenizer_does_not_learn_from_held_out_text(one_document):
    split = Split("position", 0.2)
    (text,) = training_texts(one_document, 1, split)
    train, held_out = split.parts(words(3000))
    assert text == train.text
    assert held_out.text not in text


def test_an_evaluation_in_training_reads_a_micro_batch_in_each_process():
    of = ["training.positions=128", "data.k=4", "autoencoder_training.positions=32", "evaluation.micro_batch=2"]
    calm, ar = (configuration.load(Experiment, None, [*of, f"head.kind={kind}"]) for kind in ("energy", "softmax"))
    assert held_out_tokens(calm) == 2 * 2 * 128 * 4
    assert held_out_tokens(ar) == 2 * 2 * 128
