import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import ROOT, finish, torchrun

from calm_core import config
from calm_core.config import command, option
from calm_core.errors import ExitCode, UserError


@dataclass(frozen=True)
class Training:
    steps: int = option(3, "number of updates")


@dataclass(frozen=True)
class Other:
    width: int = option(5, "of another command")


@dataclass(frozen=True)
class Root:
    seed: int = option(1, "seed of everything")
    training: Training = option(Training, "the run")
    other: Other = option(Other, "another command's")


@pytest.fixture(autouse=True)
def no_demo(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "DEFAULT_CONFIG", tmp_path / "demo.yaml")
    monkeypatch.delenv("RANK", raising=False)


def run(*argv: str, action=lambda *_: None) -> int:
    return command.run("Train something.", Root, ["training"], action, argv)


def test_the_action_gets_the_configuration(tmp_path):
    path = tmp_path / "lr=1.yaml"
    path.write_text("training: {steps: 8}\nother: {width: 9}\n")
    calls = []
    argv = ["seed=2", "--dry-run", str(path), "training.steps=9"]
    assert run(*argv, action=lambda *arguments: calls.append(arguments)) == ExitCode.OK
    assert calls == [(Root(2, Training(9), Other(9)), True)]


def test_further_options_reach_the_action_by_name(capsys):
    calls = []
    options = {"--shard": {"metavar": "i/n", "help": "a part"}, "--finish": {"action": "store_true"}}

    def action(config, dry_run, **further):
        calls.append(further)

    for argv in (["--shard", "1/2"], ["seed=2", "--finish"]):
        assert command.run("Prepare.", Root, ["training"], action, argv, options=options) == ExitCode.OK
    assert calls == [{"shard": "1/2", "finish": False}, {"shard": None, "finish": True}]
    with pytest.raises(SystemExit):
        command.run("Prepare.", Root, ["training"], action, ["--help"], options=options)
    assert "[--shard i/n] [--finish] [--dry-run]" in capsys.readouterr().out


def test_without_a_configuration_the_demo_is_used(tmp_path):
    calls = []
    run(action=lambda *arguments: calls.append(arguments))
    (tmp_path / "demo.yaml").write_text("seed: 5\n")
    run(action=lambda *arguments: calls.append(arguments))
    assert calls == [(Root(), False), (Root(seed=5), False)]


def test_the_configuration_that_is_used_is_named_where_none_is_given(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("seed: 5\n")
    run(str(tmp_path / "c.yaml"))
    assert capsys.readouterr().out == ""
    run()
    assert "using the built-in defaults" in capsys.readouterr().out
    (tmp_path / "demo.yaml").write_text("seed: 5\n")
    run(action=lambda *_: print("working"))
    assert capsys.readouterr().out == f"# no configuration is given: using {tmp_path / 'demo.yaml'}\nworking\n"


def test_the_exit_code_is_the_action_s():
    assert run(action=lambda *_: ExitCode.STOPPED) == 75


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--dry"], "--dry"),
        (["a.yaml", "b.yaml"], "b.yaml is a second configuration after a.yaml"),
        (["missing.yaml"], "missing.yaml"),
        (["training.stps=1"], "did you mean training.steps?"),
        (["other.width=1"], "other.width has no effect"),
    ],
)
def test_bad_usage_is_one_sentence(capsys, argv, part):
    assert run(*argv, action=lambda *_: pytest.fail("the action ran")) == ExitCode.USAGE
    output = capsys.readouterr()
    assert output.out == ""
    assert part in output.err
    assert output.err.count("\n") == 1


def refuse(*_) -> None:
    raise UserError("The field is wrong: fix it.")


@pytest.mark.parametrize(
    ("rank", "agreed", "printed"),
    [
        ("0", False, "The field is wrong: fix it.\n"),
        ("0", True, "The field is wrong: fix it.\n"),
        ("3", False, "rank 3: The field is wrong: fix it.\n"),
        ("3", True, ""),
    ],
)
def test_every_rank_prints_its_sentence_unless_all_have_the_same(monkeypatch, capsys, rank, agreed, printed):
    def fail(*_) -> None:
        error = UserError("The field is wrong: fix it.")
        error.on_all_ranks = agreed
        raise error

    monkeypatch.setenv("RANK", rank)
    assert run(action=fail) == ExitCode.USAGE
    assert capsys.readouterr().err == printed


def test_an_unexpected_failure_prints_its_trace(capsys):
    assert command.guard(lambda: 1 // 0) == ExitCode.FAILED
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_an_interrupt_is_130(capsys):
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert command.guard(interrupt) == 130
    assert capsys.readouterr().err == ""


def test_help_lists_the_fields_that_the_command_reads(capsys):
    with pytest.raises(SystemExit) as ending:
        run("--help", action=refuse)
    assert ending.value.code == 0
    text = capsys.readouterr().out
    assert "Train something." in text
    assert config.describe(Root, ["training"]) in text
    assert "other.width" not in text


def test_a_tool_s_paths_may_begin_with_home_and_variables(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = command.Parser(prog="evaluate.py")
    parser.add_argument("--output", type=Path)
    assert parser.parse_args(["--output=~/x"]).output == Path("/home/me/x")
    with pytest.raises(UserError, match=r"\$NO_SUCH_NAME, which is not set"):
        parser.parse_args(["--output=$NO_SUCH_NAME/x"])


def test_a_tool_s_parser_complains_by_a_sentence(capsys):
    parser = command.Parser(prog="convert.py")
    parser.add_argument("path")
    assert command.guard(lambda: parser.parse_args([])) == ExitCode.USAGE
    assert capsys.readouterr().err.startswith("convert.py: the following arguments are required: path")


SCRIPT = '''
"""Count to something."""
from dataclasses import dataclass
from calm_core.config import command
from calm_core.config import option

@dataclass(frozen=True)
class Root:
    count: int = option(3, "how far")

def count(config, dry_run):
    print(config.count, dry_run)

if __name__ == "__main__":
    raise SystemExit(command.run(__doc__, Root, sections=(), action=count))
'''


def test_a_script_as_a_user_runs_it(tmp_path):
    (tmp_path / "count.py").write_text(SCRIPT)
    (tmp_path / "c.yaml").write_text("count: 4\n")

    def start(*argv: str) -> subprocess.CompletedProcess:
        command_line = [sys.executable, "count.py", "c.yaml", *argv]
        return subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True, check=False)

    good, bad, usage = start("count=5", "--dry-run"), start("count=x"), start("--help")
    assert (good.returncode, good.stdout, good.stderr) == (0, "5 True\n", "")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "count must be of type int, but the command line gives x.\n"
    assert usage.returncode == 0
    assert "usage: count.py [CONFIG.yaml] [key=value ...] [--dry-run] [--help]" in usage.stdout


WORK = """
import sys
from calm_core.config import command
from calm_core.errors import UserError

def work():
    for number in range(20000):
        print("a line of output é")
    print("a note é", file=sys.stderr)
    with open(sys.argv[1], "w") as file:
        file.write("done")

raise SystemExit(command.guard(work))
"""

ONE_RANK_FAILS = """
import os
from calm_core.config import command
from calm_core.errors import UserError

def work():
    if os.environ["RANK"] == "1":
        raise UserError("This rank has no GPU: start fewer.")

raise SystemExit(command.guard(work))
"""


@pytest.mark.parametrize(
    ("redirect", "note"),
    [
        ("> /dev/full", "cannot be written (No space left on device)"),
        ("| head -1", ""),
        (">&-", ""),
        ("2>&-", None),
        ("2> /dev/full", None),
        (">&- 2>&-", None),
    ],
)
def test_work_is_done_whatever_becomes_of_its_output(tmp_path: Path, redirect: str, note: str | None) -> None:
    (tmp_path / "work.py").write_text(WORK)
    command = f"set -o pipefail; {sys.executable} {tmp_path}/work.py {tmp_path}/product <&- {redirect}"
    code, output = finish(["bash", "-c", command], 60)
    assert code == 0, output
    assert (tmp_path / "product").read_text() == "done"
    assert "Traceback" not in output
    assert "Exception ignored" not in output
    if note is not None:
        assert note in output
        assert "a note" in output


def test_text_that_the_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(WORK)
    code, output = finish([sys.executable, f"{tmp_path}/work.py", f"{tmp_path}/out"], 60, PYTHONIOENCODING="ascii")
    assert code == 0, output[-2000:]
    assert "a line of output \\xe9\n" in output
    assert "a note \\xe9\n" in output


@pytest.mark.slow
def test_an_error_of_one_rank_is_printed(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(ONE_RANK_FAILS)
    code, output = finish(torchrun(2, tmp_path / "work.py"), 200)
    assert code == 2
    assert output.count("rank 1: This rank has no GPU: start fewer.") == 1


def test_a_tool_in_a_pod_that_numbers_its_ranks_prints_its_error(tmp_path: Path) -> None:
    code, output = finish([sys.executable, str(ROOT / "data_prep" / "verify.py"), str(tmp_path)], 60, RANK="3")
    assert code == 2
    assert output.startswith(f"rank 3: {tmp_path} holds no finished store")
