"""Weight folders of the public reference implementation that are not whole, or more than weights."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from launching import ROOT, finish
from reference_folders import CONFIGS, part, write

from calm_core.errors import ExitCode, UserError
from calm_core.reference.weight_folder import read_folder


@pytest.mark.parametrize("pickled", [False, True])
def test_shards_that_are_not_whole_are_named(tmp_path: Path, pickled: bool) -> None:
    source = write(tmp_path / "in", CONFIGS["autoencoder"], part("ae."), pickled, shards=3)
    name = "pytorch_model.bin" if pickled else "model.safetensors"
    first, second, third = (source / name.replace(".", f"-0000{n}-of-00003.") for n in (1, 2, 3))
    index = source / f"{name}.index.json"
    content = json.loads(index.read_text())
    shutil.copy(first, tmp_path / "kept")
    shutil.copy(second, first)
    with pytest.raises(UserError, match=r"00001-of-00003.* do not agree on .*decoder"):
        read_folder(source)
    shutil.copy(tmp_path / "kept", first)
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(UserError, match=r"00001-of-00003.* is damaged"):
        read_folder(source)
    second.unlink()
    third.unlink()
    with pytest.raises(UserError, match=rf"lacks shards .*\({second.name}, {third.name}\)"):
        read_folder(source)
    elsewhere = dict.fromkeys(content["weight_map"], f"../{tmp_path.name}/kept")
    index.write_text(json.dumps({"weight_map": elsewhere}))
    with pytest.raises(UserError, match="lacks shards"):
        read_folder(source)
    index.write_text(json.dumps({"weight_map": ["a"]}))
    with pytest.raises(UserError, match="weight_map"):
        read_folder(source)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("shards", [1, 2])
def test_nothing_is_run_from_a_pickle(tmp_path: Path, shards: int) -> None:
    tensors = part("ae.") | {"a": Malicious(tmp_path / "harm")}
    source = write(tmp_path / "in", CONFIGS["autoencoder"], tensors, pickled=True, shards=shards)
    with pytest.raises(UserError, match="is damaged, or holds more than tensors"):
        read_folder(source)
    assert not (tmp_path / "harm").exists()


@pytest.mark.slow
def test_the_script_runs_nothing_from_a_pickle(tmp_path: Path) -> None:
    source = write(tmp_path / "in", CONFIGS["autoencoder"], {"a": Malicious(tmp_path / "harm")}, pickled=True)
    script = [sys.executable, str(ROOT / "pretrain" / "convert.py"), "import", str(source), str(tmp_path / "out")]
    code, output = finish(script, seconds=200)
    assert code == ExitCode.USAGE
    assert "pytorch_model.bin is damaged, or holds more than tensors" in output
    assert "Traceback" not in output
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "out").exists()
