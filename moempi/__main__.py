"""The entry point of `moempi` and `python -m moempi`."""

from __future__ import annotations

import faulthandler
import os
import sys

from moempi import mpi, threads
from moempi.errors import EXIT_FAILED, JobError


def main() -> None:
    """Run the command line and exit with its code; nothing heavy has been imported when the first two lines run."""
    mpi.signals.install()
    threads.set_environment(os.environ, in_a_rank=mpi.launched_size() > 1)
    if sys.stderr is not None:
        faulthandler.enable()
    sys.exit(mpi.guard(run_command, sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run one command; its exit code is the integer that the command returns, else 0.

    Raises:
        JobError: the command line is wrong.
    """
    import click

    from moempi.cli import moempi

    try:
        code = moempi.main(args=arguments, prog_name="moempi", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.exceptions.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        raise JobError(_with_hint(error)) from None
    except BrokenPipeError:
        if mpi.launched_size() > 1:
            raise
        return _reader_left()
    return code if isinstance(code, int) else 0


def _with_hint(error: Exception) -> str:
    """click's message and the command whose help says more."""
    import click

    assert isinstance(error, click.ClickException)
    context = error.ctx if isinstance(error, click.UsageError) else None
    hint = f" (see `{context.command_path} --help`)" if context else ""
    return f"{error.format_message()}{hint}"


def _reader_left() -> int:
    """`moempi ... | head` has read enough: nothing to tell, and nothing to flush into the closed pipe at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return EXIT_FAILED


if __name__ == "__main__":
    main()
