"""The lock beside an output: at most one run writes it, also after a crash that left a rank behind.

`<output>.lock` is JSON: host, pid, job (digest), token, heartbeat (seconds since 1970). Its owner refreshes the
heartbeat; a lock is stale, and is taken over, when its heartbeat is old or its process on this host is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moempi.errors import DataError, JobError
from moempi.files import schema

HEARTBEAT = 5.0  # s between two refreshes
STALE = 30.0  # s without a refresh after which a lock is taken over
_LENGTH = 1024  # bytes of a lock file: every refresh overwrites it in place, whole


def lock_file(output: Path) -> Path:
    """Where the lock of an output lies."""
    return output.with_name(output.name + ".lock")


@dataclass(frozen=True)
class Lock:
    """A lock that this process took; `check` says whether it still is."""

    path: Path
    token: str
    host: str
    pid: int
    job: str

    @classmethod
    def acquire(cls, output: Path, job: str) -> Lock:
        """Take the lock of `output`, or take a stale one over.

        Args:
            output: the file that is to be written.
            job: digest of the job, for whoever reads the lock.

        Raises:
            JobError: another run holds it: names host, pid and age.
            DataError: the lock file cannot be written.
        """
        lock = cls(lock_file(output), uuid.uuid4().hex, socket.gethostname(), os.getpid(), job)
        try:
            while not lock._create():
                _take_away(output, lock.path)
        except OSError as error:
            raise DataError(f"{output}: cannot be written: {lock.path}: {error.strerror}") from error
        return lock

    def check(self) -> None:
        """Raises DataError when the lock is gone or another run's: this one must not write any more."""
        held = _read(self.path)
        if held.get("token") == self.token:
            return
        now = f"host {held.get('host')}, pid {held.get('pid')}" if held else "nobody"
        raise DataError(
            f"{self.path}: the lock of this run (host {self.host}, pid {self.pid}) was taken away and is now held by "
            f"{now}; this run stops, and what it has committed is kept"
        )

    def refresh(self) -> None:
        """Renew the heartbeat, every `HEARTBEAT` seconds.

        Raises:
            DataError: the lock changed hands, or its file cannot be written.
        """
        self.check()
        try:
            # If the lock changes hands right now, this writes into a file that has no name any more.
            handle = os.open(self.path, os.O_WRONLY)
            try:
                os.pwrite(handle, self._content(), 0)
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be refreshed: {error.strerror}") from error

    def release(self) -> None:
        """Remove the lock, if it is still this run's."""
        if _read(self.path).get("token") == self.token:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            os.pwrite(handle, self._content(), 0)
            os.fsync(handle)
        finally:
            os.close(handle)
        return True

    def _content(self) -> bytes:
        held = {"host": self.host, "pid": self.pid, "job": self.job, "token": self.token, "heartbeat": time.time()}
        return json.dumps(held).encode().ljust(_LENGTH - 1) + b"\n"


def outwait(output: Path) -> None:
    """Wait until a lock that a killed run left behind may be taken over; return at once where its owner is alive.

    Takes up to `STALE` seconds, after a kill on another host; for a batch job that follows right behind.
    """
    path = lock_file(output)
    first = _read(path)
    while (held := _read(path)) and held == first and not _died_here(held):
        age = _age(path, held)
        if age is None or age >= STALE:
            return
        time.sleep(min(1.0, STALE - age))


def _read(path: Path) -> dict[str, Any]:
    try:
        held = schema.parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def _take_away(output: Path, path: Path) -> None:
    """Remove a stale lock; raises JobError for a living one."""
    held = _read(path)
    age = _age(path, held)
    if age is None:
        return
    if age < STALE and not _died_here(held):
        owner = f"host {held.get('host', 'unknown')}, pid {held.get('pid', 'unknown')}"
        raise JobError(
            f"{output}: another run is writing it ({owner}, last sign of life {age:.0f} s ago); wait for that run, or "
            f"end it. If it is gone, start again in {STALE - age:.0f} s: {path.name} counts as left behind "
            f"{STALE:.0f} s after its last sign of life"
        )
    # Two runs may both have found it stale: only a lock that still is the one looked at is thrown away.
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside).get("token") != held.get("token"):
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()


def _age(path: Path, held: dict[str, Any]) -> float | None:
    """Seconds since the last sign of life; None when the lock has just gone."""
    try:
        # A lock without content is one that is being written now, or was when its host died.
        beat = float(held.get("heartbeat", path.stat().st_mtime))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError):
        beat = 0.0
    return max(0.0, time.time() - beat)


def _died_here(held: dict[str, Any]) -> bool:
    pid = held.get("pid")
    if held.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False
