"""The command `calm`, in a checkout and in a wheel."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from launching import ROOT, finish

from calm_core import console
from calm_core.config.load_config import ROOT as FOUND


def test_every_script_is_a_command(capsys):
    assert console.main([]) == 0
    shown = capsys.readouterr().out
    names = [path.stem.replace("_", "-") for room in ("data_prep", "pretrain") for path in (ROOT / room).glob("*.py")]
    for name in [*names, "train"]:
        assert f"\n{name} " in shown
    assert FOUND == ROOT


def test_an_unknown_command_is_refused(capsys):
    assert console.main(["trian"]) == 2
    assert "calm: trian is not a command; these are: " in capsys.readouterr().err


def test_arguments_and_exit_codes_are_the_script_s(tmp_path):
    calm = [sys.executable, "-m", "calm_core.console"]
    code, output = finish([*calm, "verify", str(tmp_path)], 60)
    assert (code, "holds no finished store" in output) == (2, True)
    code, output = finish([*calm, "compare-runs", "--help"], 60)
    assert code == 0
    assert output.startswith("usage: compare_runs.py ")


@pytest.mark.slow
def test_a_wheel_has_dependencies_scripts_and_configurations(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        [metadata] = [name for name in names if name.endswith("METADATA")]
        required = [line for line in content.read(metadata).decode().splitlines() if line.startswith("Requires-Dist:")]
    shared = {name.partition("share/calm/")[2] for name in names}
    for room, ending in (("pretrain", "py"), ("data_prep", "py"), ("configs", "yaml")):
        files = {str(path.relative_to(ROOT)) for path in (ROOT / room).rglob(f"*.{ending}")}
        assert files <= shared
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [line for line in required if "extra ==" in line]
    assert len(required) - len(optional) == len(project["dependencies"]) > 10
    assert len(optional) == sum(map(len, project["optional-dependencies"].values()))


def test_every_dependency_is_pinned() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pins = {line.partition("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line}
    assert {one.partition(">=")[0] for one in wanted} <= pins
