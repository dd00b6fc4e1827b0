"""Output that cannot be written or shown never fails a command."""

import sys
from pathlib import Path

import pytest
from launching import ROOT, finish, torchrun

SCRIPT = """
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
    (tmp_path / "work.py").write_text(SCRIPT)
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
    (tmp_path / "work.py").write_text(SCRIPT)
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
