"""Every command of the README and of docs names a script that is there and takes these arguments.

Those with a configuration are run as far as their plan; `NOT_RUN` says why others are not run.
"""

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from launching import ROOT

from calm_core.data import builder as share

PAGES = {page: page.read_text() for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}
TEXT = "\n".join(PAGES.values())
BLOCKS = re.findall(r"^```\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)  # those with a language are not commands

NOT_RUN = {
    "make": "its targets are looked up; CI runs them",
    "sbatch": "tests/slurm submits jobs",
    "launchers/pipeline.sh": "tests/slurm runs it",
    "launchers/status.sh": "tests/slurm runs it",
    "python": "the tools among them need the run of the demo, which tests/end_to_end/test_demo.py makes",
}
LINES = [line for block in BLOCKS for line in block.splitlines() if block.startswith((*NOT_RUN, "torchrun"))]
LINES = [words for line in LINES if (words := shlex.split(line, comments=True))]
COMMANDS = [line for line in LINES if line[:1] in (["python"], ["torchrun"]) and line[1] != "-m"]
COMMANDS = [list(command) for command in dict.fromkeys(map(tuple, COMMANDS))]
SCRIPTS = sorted({next(word for word in command if word.endswith(".py")) for command in COMMANDS})


@pytest.fixture
def said(monkeypatch, capsys) -> Callable[[list[str]], str]:
    """What a command prints, run in this process: a start of torch for each would take minutes."""

    def run(words: list[str]) -> str:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        output = capsys.readouterr()
        assert not ended.value.code, output.err
        return output.out

    return run


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 10
    assert set(SCRIPTS) == {
        str(path.relative_to(ROOT)) for room in ("pretrain", "data_prep") for path in (ROOT / room).glob("*.py")
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_has_help(script, said):
    assert "usage:" in said([script, "--help"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_does_not_wait_for_torch(script):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / script), "--help"], capture_output=True, text=True, check=True
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "calm_core.config.command" in loaded or "calm_core.config" in loaded
    assert not loaded & {"torch", "matplotlib", "scipy", "transformers", "megatron", "deepspeed"}


def reads_a_configuration(command: list[str]) -> bool:
    return any(word.startswith("configs/") for word in command)


@pytest.mark.parametrize("command", [c for c in COMMANDS if reads_a_configuration(c)], ids=" ".join)
def test_each_command_with_a_configuration_can_be_planned(command, said, tmp_path):
    arguments = command[next(i for i, word in enumerate(command) if word.endswith(".py")) :]
    run = [] if any(word.startswith("run=") for word in arguments) else [f"run={tmp_path / 'run'}"]
    assert said([*arguments, *run, "--dry-run"])
    assert not list(Path(tmp_path).iterdir())


def test_each_command_is_run_or_is_known_not_to_be():
    assert {line[0] for line in LINES} <= {*NOT_RUN, "torchrun"}
    for command in LINES:
        if command[1:2] == ["-m"]:
            assert find_spec(command[2]), command


def test_options_of_tools_are_known():
    for command in COMMANDS:
        text = (ROOT / next(word for word in command if word.endswith(".py"))).read_text()
        for option in (word for word in command if word.startswith("--")):
            name = option.removeprefix("--")
            assert (
                name in ("dry-run", "nproc-per-node")
                or option in share.OPTIONS
                or f'"{option}"' in text
                or f'"{name}"' in text
            ), option


def test_targets_and_links_are_there():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for page, text in PAGES.items():
        for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text):
            assert (page.parent / link).exists(), (page, link)


def test_the_readme_is_short_and_shows_a_curve_first():
    lines = PAGES[ROOT / "README.md"].splitlines()
    assert len(lines) <= 120
    assert any(line.startswith("![") for line in lines[:15])
