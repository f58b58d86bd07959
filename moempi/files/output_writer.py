"""The writer of an output: commits completions on rank 0 while the job runs, and makes the final file at its end."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from moempi.errors import DataError, JobError
from moempi.files.completions import PARTIAL, Completion, Origin, read_head
from moempi.files.lock import Lock
from moempi.files.output_parts import PATTERN, Latest, assemble, latest_of, read_parts, restore_partial, write_part
from moempi.files.parts import committed_parts, make_folder, parts_folder, remove_parts, remove_temporaries
from moempi.files.trace import refuse_existing

if TYPE_CHECKING:
    from moempi.files.inputs import Prompts


class OutputWriter:
    """Commits completions from a thread of its own; on rank 0 only, no MPI.

    `latest` says what a resumed run finds committed of every sequence, `partial` holds those that are not finished, by
    row of the input; `complete` is true when the final file is there. An error of the thread is raised, as a DataError
    with its cause, by the next `put`, `commit`, `finish` or `close`; what was committed before stays.
    """

    def __init__(
        self,
        path: Path,
        origin: Origin,
        lock: Lock,
        commit_every: float,
        latest: Latest,
        partial: dict[int, Completion],
        last_commit: int,
        complete: bool,
    ) -> None:
        self.path = path
        self.latest, self.partial = latest, partial
        self.complete = complete
        self._origin = origin
        self._lock = lock
        self._every = commit_every
        self._number = last_commit
        self._changed = threading.Condition()
        # All below is shared with the thread and guarded by _changed.
        self._pending: dict[int, Completion] = {}
        self._due = float("inf")
        self._asked = self._done = 0
        self._stopping = False
        self._error: BaseException | None = None
        self._raised = False
        self._thread = threading.Thread(target=self._work, name="outputs", daemon=True)
        self._thread.start()

    @classmethod
    def start(
        cls,
        path: Path,
        *,
        job_json: str,
        identity: dict[str, str],
        sources: dict[str, str],
        n_sequences: int,
        commit_every: float,
        resume: bool = False,
        overwrite: bool = False,
        trace: Path | None = None,
    ) -> OutputWriter:
        """Lock an output, look at what is there, and start the thread.

        Args:
            path: the final file; its folder is created where it is missing.
            job_json: the effective job.
            identity: what must not change between a run and its resume: {name: value}.
            sources: {name: SHA-256 in hex} of the files that the output is made from.
            n_sequences: rows of the input.
            commit_every: longest time in s that a completion stays uncommitted.
            resume: go on where an earlier run ended; from the start where there is nothing.
            overwrite: begin anew; an earlier run's final file is kept as `kept_output` until there is a new one.
            trace: what the run will write besides; one that is there is refused as an output is.

        Raises:
            JobError: an output or a trace is there and neither `resume` nor `overwrite` is given; another run holds
                the lock; a resume with another identity.
            DataError: what is there is damaged, or nothing can be written there.
        """
        if resume and overwrite:
            raise JobError("--resume and --overwrite exclude each other: one goes on with the output, one replaces it")
        origin = Origin(job_json, dict(identity), dict(sources), n_sequences)
        make_folder(path.parent)
        lock = Lock.acquire(path, hashlib.sha256(job_json.encode()).hexdigest())
        try:
            if overwrite:
                _set_aside(path)
            elif not resume:
                _refuse_existing(path)
                if trace is not None:
                    refuse_existing(trace)
            remove_temporaries(path)
            if trace is not None:
                remove_temporaries(trace)
            complete = resume and _is_complete(path, origin)
            if complete:
                remove_parts(path)
            parts = read_parts(path)
            if parts:
                _check_identity(parts[0].path, parts[0].origin, origin)
            if not complete:
                make_folder(parts_folder(path))
            last = parts[-1].commit if parts else 0
            latest = latest_of(parts, n_sequences)
            return cls(path, origin, lock, commit_every, latest, restore_partial(parts, latest), last, complete)
        except BaseException:
            lock.release()
            raise

    def put(self, completion: Completion) -> None:
        """Hand over a completion, finished or partial; never waits for the disk.

        The arrays must not change afterwards. A later completion of the same sequence replaces an earlier one.
        """
        with self._changed:
            self._raise_error()
            if self._stopping or self.complete:
                raise RuntimeError(f"{self.path}: put() after close(), or into a complete output")
            if not self._pending:
                self._due = time.monotonic() + self._every
                self._changed.notify_all()
            self._pending[completion.index] = completion

    def commit(self, wait: bool = True) -> None:
        """Commit what was put so far; with `wait`, return only when it outlives a crash."""
        with self._changed:
            self._raise_error()
            self._asked += 1
            ticket = self._asked
            self._changed.notify_all()
            while wait and self._done < ticket and self._error is None:
                self._changed.wait()
            self._raise_error()

    def finish(self, prompts: Prompts, meta: Mapping[str, Any]) -> None:
        """Commit, write the final file in input order, and remove the parts.

        Args:
            prompts: the whole input.
            meta: see `output_parts.assemble`: `mode`, `decode`, and what was measured.
        """
        self.commit(wait=True)
        assemble(self.path, self._origin, prompts, meta, self._lock.check)
        remove_parts(self.path)
        kept_output(self.path).unlink(missing_ok=True)
        self.complete = True

    def close(self) -> None:
        """Commit what was put, stop the thread and release the lock; the parts of an unfinished run stay."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        self._lock.release()
        with self._changed:
            if not self._raised:
                self._raise_error()

    def __enter__(self) -> OutputWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _raise_error(self) -> None:
        if self._error is not None:
            self._raised = True
            raise DataError(
                f"{self.path}: completions could not be committed: {self._error}\n"
                "What was committed before is kept; --resume goes on from there"
            ) from self._error

    # ------------------------------------------------------------ the thread

    def _work(self) -> None:
        try:
            while True:
                batch, ticket, stopping = self._next()
                if batch:
                    self._number += 1
                    write_part(self.path, self._number, batch, self._origin, self._lock.check)
                with self._changed:
                    self._done = ticket
                    self._changed.notify_all()
                if stopping:
                    return
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> tuple[list[Completion], int, bool]:
        """Wait until there is something to do: (completions to commit, requests that this answers, stop?)."""
        with self._changed:
            while not (self._stopping or self._asked > self._done or time.monotonic() >= self._due):
                self._changed.wait(min(self._due - time.monotonic(), threading.TIMEOUT_MAX))
            batch, self._pending, self._due = list(self._pending.values()), {}, float("inf")
            return batch, self._asked, self._stopping


# ---------------------------------------------------------------- what is there already


def kept_output(path: Path) -> Path:
    """Where an output that is to be replaced lies until the new one is complete."""
    return path.with_name(path.name + ".old")


def _set_aside(path: Path) -> None:
    try:
        if path.exists():
            path.replace(kept_output(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be overwritten: {error.strerror}") from error
    remove_parts(path)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise JobError(f"{path}: exists already; give --overwrite to replace it, or another `output.file`")
    parts = committed_parts(path, PATTERN)
    if parts:
        raise JobError(
            f"{path}: an earlier run was not finished ({len(parts)} commits in {parts_folder(path).name}); "
            "give --resume to go on with it, or --overwrite to start again"
        )


def _is_complete(path: Path, origin: Origin) -> bool:
    if not path.exists():
        return False
    found = read_head(path)
    _check_identity(path, found.origin, origin)
    if len(found.ids) != origin.n_sequences or bool((found.finish_reason == PARTIAL).any()):
        raise JobError(
            f"{path}: holds unfinished sequences and cannot be resumed, since it was merged from an unfinished run; "
            "give another `output.file`, or --overwrite"
        )
    return True


def _check_identity(path: Path, found: Origin, wanted: Origin) -> None:
    before = {**found.identity, "sequences": str(found.n_sequences)}
    now = {**wanted.identity, "sequences": str(wanted.n_sequences)}
    lines = [
        f"  {key}: was {before.get(key, 'not set')!r}, is now {now.get(key, 'not set')!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if lines:
        text = "\n".join(lines)
        raise JobError(
            f"{path}: --resume needs the job that it was begun with, but these differ:\n{text}\n"
            "Undo the change to go on, or give --overwrite to start again"
        )
