"""What can end a command early, and the exit code that each ending has."""

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of every script; a launcher decides by them whether to try again."""

    OK = 0
    FAILED = 1  # an unexpected failure: worth a retry
    USAGE = 2  # bad usage, configuration or input: a retry would fail the same way
    STOPPED = 75  # stopped on request (signal or stop file), checkpoint saved: run again to resume
    WATCHDOG = 76  # a step, evaluation or save hung and the watchdog ended the run: worth a retry
    INTERRUPTED = 130  # interrupted at the terminal: 128 + SIGINT, as shells count


class UserError(Exception):
    """An error that the user can correct: one sentence that names the field or file and says what to do.

    Scripts print the sentence alone, without a traceback, and exit with `ExitCode.USAGE`.

    Attributes:
        on_all_ranks: whether every rank of the run raises this same error, so that rank 0 alone prints it.
    """

    on_all_ranks = False
