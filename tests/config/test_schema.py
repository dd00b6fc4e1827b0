import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calm_core import config
from calm_core.config import option
from calm_core.errors import UserError


@dataclass(frozen=True)
class Optimizer:
    lr: float = option(3e-4, "peak learning rate")
    steps: int = option(100, "updates")
    nesterov: bool = option(False, "look ahead")

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"optimizer.steps={self.steps} is too few: take at least 1.")


@dataclass(frozen=True)
class Part:
    path: str = option("", "place")
    weight: float = option(1.0, "share")


@dataclass(frozen=True)
class Data:
    corpus: list[str] = option(["a.txt", "b.txt"], "files")
    weights: list[float] = option([1.0], "share of each")
    limit: float | None = option(None, "seconds")
    tokenizer: str = option("", "path")
    language: str | None = option("en", "language")
    verify: Literal["auto", "full"] = option("auto", "checks")
    shares: dict[str, float] = option({}, "share by name")
    parts: list[Part] = option([], "parts")


@dataclass(frozen=True)
class Root:
    run: str = option("runs/demo", "folder")
    seed: int = option(1, "seed of everything")
    optimizer: Optimizer = option(Optimizer(steps=7), "training")
    data: Data = option(Data, "what to read")


def load(text: str = "", *overrides: str, sections: list[str] | None = None, folder: Path) -> Root:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return config.load(Root, path, overrides, sections)


@pytest.fixture
def read(tmp_path):
    return lambda *arguments, **options: load(*arguments, folder=tmp_path, **options)


def refusal(read, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(*arguments, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith((".", "?"))
    return sentence


def test_later_sources_win(read):
    loaded = read("optimizer:\n  lr: 0.1\n  steps: 5\n", "optimizer.lr=0.2")
    assert loaded.optimizer == Optimizer(lr=0.2, steps=5)
    assert loaded.data == Data()


def test_a_list_of_sections_is_read_checked_and_saved(read, tmp_path):
    loaded = read("data:\n  parts:\n  - {path: a, weight: 2}\n  - {path: b}\n")
    assert loaded.data.parts == [Part("a", 2.0), Part("b")]
    config.save(loaded, tmp_path / "saved.yaml")
    assert config.load(Root, tmp_path / "saved.yaml", []) == loaded
    assert read("", "data.parts=[{path: c}]").data.parts == [Part("c")]
    for wrong in ("[{pathh: c}]", "[{weight: much}]", "[3]"):
        assert "data.parts must be of type list[{path, weight}]" in refusal(read, "", f"data.parts={wrong}")


def test_without_a_file_or_with_an_empty_one_the_defaults_hold(read):
    assert config.load(Root, None, []) == read("") == read("optimizer:\n") == Root()
    assert Root().optimizer.steps == 7


def test_instances_share_no_list():
    first = Root()
    first.data.corpus.append("c.txt")
    assert Root().data.corpus == config.load(Root, None, []).data.corpus == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("optimizer.lr=3e-4", "lr", 3e-4),
        ("optimizer.lr=-1E+2", "lr", -100.0),
        ("optimizer.lr=1", "lr", 1.0),
        ("optimizer.steps=1_000", "steps", 1000),
        ("optimizer.nesterov=true", "nesterov", True),
        ("data.corpus=[x, y z]", "corpus", ["x", "y z"]),
        ("data.corpus=my.txt", "corpus", ["my.txt"]),
        ("data.corpus=*.jsonl", "corpus", ["*.jsonl"]),
        ("data.corpus=[*.jsonl]", "corpus", ["*.jsonl"]),
        ("data.corpus=[*.jsonl, 'b*.txt', c.txt]", "corpus", ["*.jsonl", "b*.txt", "c.txt"]),
        ("data.corpus=['*.jsonl']", "corpus", ["*.jsonl"]),
        ("data.corpus=[part-?.jsonl]", "corpus", ["part-?.jsonl"]),
        ("data.corpus=[part-[0-9].jsonl,x]", "corpus", ["part-[0-9].jsonl", "x"]),
        ("data.corpus=[part-[a,b].jsonl,x]", "corpus", ["part-[a,b].jsonl", "x"]),
        ("data.corpus=2024", "corpus", ["2024"]),
        ("data.weights=0.5", "weights", [0.5]),
        ("data.weights=1e-1", "weights", [0.1]),
        ("data.parts={path: a}", "parts", [Part("a")]),
        ("data.weights=[1, 2e-1]", "weights", [1.0, 0.2]),
        ("data.limit=5", "limit", 5.0),
        ("data.limit=null", "limit", None),
        ("data.tokenizer=", "tokenizer", ""),
        ("data.tokenizer=2024", "tokenizer", "2024"),
        ("data.tokenizer=a=b", "tokenizer", "a=b"),
        ("data.tokenizer=*.model", "tokenizer", "*.model"),
        ("data.language=null", "language", None),
        ("data.language=no", "language", "no"),
        ("data.verify=full", "verify", "full"),
        ("data.shares={news: 1}", "shares", {"news": 1.0}),
    ],
)
def test_values_are_of_the_annotated_type(read, override, key, expected):
    loaded = read("", override)
    value = getattr(getattr(loaded, override.partition(".")[0]), key)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=fast",
        "optimizer.lr=true",
        "optimizer.lr=.nan",
        "optimizer.lr=.inf",
        "optimizer.lr=-.inf",
        "optimizer.lr=1e999",
        "optimizer.lr=nan",
        "optimizer.lr=",
        "optimizer.steps=1.0",
        "optimizer.steps=true",
        "optimizer.steps=1e3",
        "optimizer.nesterov=1",
        "data.corpus={a: x}",
        "data.weights=x",
        "data.corpus=[1]",
        "data.weights=[a]",
        "data.limit=soon",
        "data.tokenizer=[a]",
        "data.verify=size",
        "data.shares={news: x}",
    ],
)
def test_a_value_of_another_type_is_refused_by_key_value_and_type(read, override):
    sentence = refusal(read, "", override)
    key, _, text = override.partition("=")
    assert key in sentence
    assert text in sentence
    assert "must be of type" in sentence


def test_a_file_is_typed_as_strictly(read):
    sentence = refusal(read, "run: 2024\n")
    assert "run must be of type str" in sentence
    assert "c.yaml gives 2024" in sentence
    assert "'a b'" in refusal(read, 'seed: "a\\n\\nb"\n')


@pytest.mark.parametrize(
    ("text", "overrides", "near"),
    [
        ("optimiser: {lr: 1}\n", [], "optimizer"),
        ("optimizer: {stepps: 1}\n", [], "optimizer.steps"),
        ("", ["optimizr.lr=1"], "optimizer.lr"),
        ("", ["lr=1"], "optimizer.lr"),
        ("", ["sead=1"], "seed"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(read, text, overrides, near):
    assert f"did you mean {near}?" in refusal(read, text, *overrides)


@pytest.mark.parametrize("key", ["1", "true", "zzz", "optimizer.lr.x", ""])
def test_an_unknown_key_near_nothing_is_refused(read, key):
    assert "Unknown configuration key" in refusal(read, "", f"{key}=1")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("optimizer: 3\n", "optimizer"),
        ("- a\n- b\n", "[a, b]"),
        ("seed: 1\nrun: [\n", "line 3"),
        ("seed: 1\nrun: a\nseed: 2\n", "line 3: the key seed is given twice, first in line 1"),
        ("optimizer:\n  lr: 1\n  lr: 1\n", "line 3"),
        ("optimizer: {lr: 1, lr: 1}\n", "line 1"),
        ("run: !!python/object/apply:os.getcwd []\n", "line 1"),
        ("run: 2024-13-45\n", "not valid YAML"),
        ("run: \x07\n", "not valid YAML"),
        ("? [1, 2]\n: 3\n", "line 1"),
    ],
)
def test_a_malformed_file_is_refused_by_the_place(read, text, part):
    sentence = refusal(read, text)
    assert part in sentence
    assert "c.yaml" in sentence


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"run: \xff\n")
    with pytest.raises(UserError, match=r"c\.yaml is not valid YAML"):
        config.load(Root, path, [])


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_missing_file_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="Cannot read the configuration"):
        config.load(Root, tmp_path / name, [])


def test_an_override_without_value_or_of_a_whole_section_is_refused(read):
    assert "key=value" in refusal(read, "", "optimizer.lr")
    assert "optimizer.field=value" in refusal(read, "", "optimizer=1")


def test_values_that_do_not_fit_together_are_refused_by_the_dataclass(read):
    assert refusal(read, "", "optimizer.steps=0") == "optimizer.steps=0 is too few: take at least 1."


def test_the_file_may_hold_sections_that_the_command_does_not_read(read):
    loaded = read("optimizer: {steps: 3}\n", "data.limit=1", "seed=2", sections=["data"])
    assert (loaded.optimizer.steps, loaded.data.limit, loaded.seed) == (3, 1.0, 2)
    assert "must be of type int" in refusal(read, "optimizer: {steps: x}\n", sections=["data"])


def test_an_override_that_the_command_does_not_read_is_refused(read):
    assert "reads run, seed, data" in refusal(read, "", "optimizer.steps=3", sections=["data"])


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20)
floats = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=40, deadline=None)
@given(texts, st.integers(), floats, st.lists(texts), st.none() | floats, st.dictionaries(texts, floats))
def test_a_saved_configuration_loads_equal(tmp_path_factory, run, seed, lr, corpus, limit, shares):
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    saved = Root(run, seed, Optimizer(lr), Data(corpus=corpus, limit=limit, shares=shares))
    config.save(saved, path)
    assert config.load(Root, path, []) == saved
    assert list(config.read_yaml(path)) == ["run", "seed", "optimizer", "data"]
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]


def test_a_save_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "config.yaml"
    config.save(Root(), path)
    with pytest.raises(Exception, match="cannot represent"):
        config.save(dataclasses.replace(Root(), run=object()), path)
    assert config.load(Root, path, []) == Root()
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_the_description_lists_every_field_of_the_sections():
    lines = config.describe(Root, ["optimizer"]).splitlines()
    assert [line.split()[0] for line in lines] == [
        "run",
        "seed",
        "optimizer.lr",
        "optimizer.steps",
        "optimizer.nesterov",
    ]
    assert lines[3].split() == ["optimizer.steps", "int", "7", "updates"]
    assert len({line.index(meaning) for line, meaning in zip(lines, ["folder", "seed of", "peak"], strict=False)}) == 1
    assert " auto | full " in config.describe(Root)


def test_differences_are_named_by_dotted_key():
    old, new = config.to_dict(Root()), config.to_dict(Root(seed=2, optimizer=Optimizer(lr=0.5, steps=7)))
    assert config.differences(old, old) == []
    assert config.differences(old, new) == [("seed", 1, 2), ("optimizer.lr", 3e-4, 0.5)]
    assert config.differences({"a": {"b": 1}}, {"c": 2}) == [("a.b", 1, None), ("c", None, 2)]


def test_a_description_is_wrapped_to_the_width():
    whole = config.describe(Root)
    for width in (60, 90):
        wrapped = config.describe(Root, width=width)
        assert max(map(len, wrapped.splitlines())) <= width
        assert wrapped.split() == whole.split()
    assert "optimizer.nesterov" in config.describe(Root, width=60)


def test_text_that_yaml_reads_as_something_else_wants_quotes(read):
    assert "put quotes around text" in refusal(read, "data: {corpus: [*.jsonl]}\n")
    assert "gives 2024 without quotes: put it in quotes" in refusal(read, "run: 2024\n")
