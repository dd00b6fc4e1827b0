"""Write the page of a run, RUN/report.html, or one page that compares several runs."""

from collections.abc import Sequence
from pathlib import Path

from calm_core.config import command


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page and say where it is."""
    parser = command.Parser(description=__doc__, allow_abbrev=False)
    what = "folder of an experiment, such as runs/demo, or of one of its trainings"
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=what)
    parser.add_argument("--output", type=Path, help="the page (default: RUN/report.html; comparison.html for several)")
    arguments = parser.parse_args(argv)
    from calm_core.report.run_page import write_comparison, write_run_page

    if len(arguments.runs) == 1:
        print(write_run_page(arguments.runs[0], arguments.output))
        return
    page = arguments.output or Path("comparison.html")
    write_comparison(arguments.runs, page)
    print(page)


if __name__ == "__main__":
    raise SystemExit(command.guard(main))
