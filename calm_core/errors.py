"""What can end a command early, and the exit code that each ending has."""

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of every script; a launcher decides by them whether to try again."""

    OK = 0
    FAILED = 1  # an unexpected failure: worth a retry
    USAGE = 2  # bad usage, configuration or input: a retry would fail alike
    STOPPED = 75  # stopped on request (signal or stop file), checkpoint saved: run again to go on
    WATCHDOG = 76  # a step, evaluation or save hung and the watchdog ended the run: worth a retry


class UserError(Exception):
    """Something the user can mend: the message is one sentence that names the field or file and the mend.

    Scripts print the sentence alone, without a traceback, and exit with `ExitCode.USAGE`.
    """
