"""The lock beside an output: at most one run writes it, also after a crash that left a rank behind.

`<output>.lock` is JSON: host, pid, job (digest), token, heartbeat (seconds since 1970, for people). A thread of its
owner rewrites it every `HEARTBEAT` seconds; a lock is stale, and is taken over, when its process on this host is gone
or when it did not change for `STALE` seconds. Clocks of two hosts are never compared.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from moempi.errors import DataError, JobError
from moempi.files import schema

HEARTBEAT = 5.0  # s between two refreshes
STALE = 30.0  # s without a refresh after which a lock is taken over
LOOK = 0.5  # s between two looks at another run's lock, or at one that cannot be read
_LENGTH = 1024  # bytes of a lock file: every refresh overwrites it in place, whole

log = logging.getLogger("moempi")


def lock_file(output: Path) -> Path:
    """Where the lock of an output lies."""
    return output.with_name(output.name + ".lock")


class Lock:
    """A lock that this process took and keeps alive; `check` says whether it still has it."""

    def __init__(self, path: Path, job: str) -> None:
        self._path, self._token = path, uuid.uuid4().hex
        self._about = {"host": socket.gethostname(), "pid": os.getpid(), "job": job, "token": self._token}
        self._handle = -1
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    @classmethod
    def acquire(cls, output: Path, job: str) -> Lock:
        """Take the lock of `output`; one that is there is watched, for up to `STALE` seconds, and taken over if stale.

        Args:
            output: the file that is to be written.
            job: digest of the job, for whoever reads the lock.

        Raises:
            JobError: another run holds it: names host and pid.
            DataError: the lock file cannot be written.
        """
        lock = cls(lock_file(output), job)
        try:
            while not lock._create():
                _take_away(output, lock._path)
        except OSError as error:
            raise DataError(f"{output}: cannot be written: {lock._path}: {error.strerror}") from error
        lock._thread.start()
        return lock

    def check(self) -> None:
        """Raises DataError when the lock is gone or another run's: this one must not write any more."""
        try:
            held = _read(self._path)
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read: {error.strerror}") from error
        if held is None or not self._is_mine(held):
            raise DataError(
                f"{self._path}: the lock of this run ({_owner(self._content())}) was taken away and is now held by "
                f"{_owner(held) if held else 'nobody'}; this run stops, and what it has committed is kept"
            )

    def release(self) -> None:
        """Remove the lock, if it is still this run's; once is enough."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        os.close(self._handle)
        with contextlib.suppress(OSError):
            if self._is_mine(self._path.read_bytes()):
                self._path.unlink()

    def _create(self) -> bool:
        try:
            self._handle = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            self._refresh()
        except OSError:
            os.close(self._handle)
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT):
            # A lock that cannot be refreshed becomes stale; whether it was taken over then, `check` sees.
            with contextlib.suppress(OSError):
                self._refresh()

    def _refresh(self) -> None:
        # By its handle: after the lock changed hands this writes into a file that has no name any more.
        os.pwrite(self._handle, self._content(), 0)
        os.fsync(self._handle)

    def _content(self) -> bytes:
        return json.dumps(self._about | {"heartbeat": time.time()}).encode().ljust(_LENGTH - 1) + b"\n"

    def _is_mine(self, held: bytes) -> bool:
        return self._token.encode() in held


def _take_away(output: Path, path: Path) -> None:
    """Remove a lock that is stale, which takes `STALE` seconds to see; raises JobError for one that lives."""
    first = held = _read(path)
    if first is None:
        return
    if not _died_here(first):
        log.warning(
            "%s: locked by a run (%s); waiting for a sign of life from it, up to %.0f s", output, _owner(first), STALE
        )
    end = time.monotonic() + STALE
    while held == first and not _died_here(first) and time.monotonic() < end:
        time.sleep(LOOK)
        held = _read(path)
    if held is None:
        return
    if held != first:
        raise JobError(f"{output}: another run is writing it ({_owner(held)}); wait for that run, or end it")
    # Two runs may both have found it stale: only a lock that still is the one looked at is thrown away.
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside) != held:
        with contextlib.suppress(FileExistsError):
            schema.move_new(aside, path)
    aside.unlink(missing_ok=True)


def _read(path: Path) -> bytes | None:
    """What a lock says, None where there is none; an error that goes away within `STALE` seconds is no answer."""
    end = time.monotonic() + STALE
    while True:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError:
            if time.monotonic() >= end:
                raise
        time.sleep(LOOK)


def _parse(held: bytes) -> dict[str, object]:
    try:
        found = schema.parse_json(held)
    except ValueError:  # as while it is being created
        return {}
    return found if isinstance(found, dict) else {}


def _owner(held: bytes) -> str:
    found = _parse(held)
    return f"host {found.get('host', 'unknown')}, pid {found.get('pid', 'unknown')}"


def _died_here(held: bytes) -> bool:
    found = _parse(held)
    pid = found.get("pid")
    if found.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False
