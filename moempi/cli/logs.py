"""Where a run's messages go: the terminal for those of rank 0 and for warnings, a file per rank if asked for."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from moempi.errors import JobError
from moempi.progress import CLEAR

END = logging.getLogger("moempi.end")  # why a rank ended: for its file; the terminal is told by `moempi.mpi.guard`


def set_up(rank: int, *, quiet: bool, folder: Path | None, in_terminal: bool, append: bool = False) -> None:
    """Send messages of this rank where they belong.

    Args:
        quiet: only warnings and errors, also of rank 0.
        folder: gets a file `rank-00000.log` and so on, with everything.
        append: to those that an earlier run has left there.
        in_terminal: a bar may stand in the line, and is wiped first.

    Raises:
        JobError: the folder or the file cannot be made.
    """
    screen = logging.StreamHandler(sys.stderr)
    screen.setLevel(logging.INFO if rank == 0 and not quiet else logging.WARNING)
    wipe, name = CLEAR if in_terminal else "", f"rank {rank}: " if rank else ""
    screen.setFormatter(logging.Formatter(f"{wipe}{name}%(message)s"))
    screen.addFilter(lambda record: record.name != END.name)
    handlers: list[logging.Handler] = [screen]
    if folder is not None:
        handlers.append(_file(folder, rank, "a" if append else "w"))
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    logging.getLogger("moempi").setLevel(logging.DEBUG)


def _file(folder: Path, rank: int, mode: str) -> logging.Handler:
    path = folder / f"rank-{rank:05d}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, mode=mode, encoding="utf-8")
    except OSError as error:
        raise JobError(f"--log-dir {folder}: {path.name} cannot be made: {error.strerror}") from None
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s"))
    return handler
