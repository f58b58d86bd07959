"""Every error a user can meet, and the exit code that it ends the program with.

The table of exit codes is in docs/running.md; a test compares the two.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_STALLED = 76
EXIT_COMMITTED = 75
EXIT_INTERRUPTED = 130
EXIT_KILLED = 137


class MoempiError(Exception):
    """An error with a cause that a user can act on; printed as one message, without a traceback."""

    exit_code = EXIT_FAILED


class JobError(MoempiError):
    """The job file, an option or the way the program was started is wrong (exit code 2)."""

    exit_code = 2


class DataError(MoempiError):
    """A file is missing, damaged, or holds what it must not (exit code 3)."""

    exit_code = 3


class FitError(MoempiError):
    """The job does not fit the ranks or their memory (exit code 4)."""

    exit_code = 4


class StallError(MoempiError):
    """A dispatch stayed unanswered, or a rank silent, for longer than `engine.stall_timeout` (exit code 76)."""

    exit_code = EXIT_STALLED
