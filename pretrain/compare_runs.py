"""The first step at which two training runs differ, and in what: exit code 0 if they agree, 1 if they differ.

Compares what metrics.jsonl of both records of the same steps, except speed and memory.
"""

from collections.abc import Sequence
from pathlib import Path

from calm_core.config import command
from calm_core.errors import ExitCode


def compare(argv: Sequence[str] | None = None) -> ExitCode:
    """Parse, compare, print."""
    parser = command.Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("one", type=Path, help="folder of a training run, such as runs/demo/calm")
    parser.add_argument("other", type=Path, help="folder of another")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="largest relative difference of equal numbers (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    from calm_core.training.run_log import first_difference

    found = first_difference(arguments.one, arguments.other, arguments.tolerance)
    if found is None:
        print("no difference in any step that both have recorded")
        return ExitCode.OK
    print(f"step {found.step} ({found.kind}): {found.key} is {found.ours} in {arguments.one}")
    print(f"{'':>{len(f'step {found.step} ({found.kind}): {found.key}')}} and {found.theirs} in {arguments.other}")
    return ExitCode.FAILED


if __name__ == "__main__":
    raise SystemExit(command.guard(compare))
