"""Start programs under a real mpirun, watch what they print, signal them, and leave nothing running behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from moempi import launch

PROGRAMS = Path(__file__).parent / "programs"


@dataclass(frozen=True)
class Ended:
    """How a program ended: exit code (negative: killed by that signal), what it printed, seconds since its start."""

    code: int
    out: str
    err: str
    seconds: float


class Running:
    """A program in a session of its own; as a context manager it kills what is left of it at the end."""

    def __init__(self, command: list[str], env: dict[str, str] | None = None) -> None:
        self.begin = time.monotonic()
        environ = launch.child_environment({**os.environ, **(env or {})}, as_root=os.geteuid() == 0)
        self._folder = ExitStack()  # of an mpirun that is started without the launcher, which has its own
        self.process = subprocess.Popen(
            command,
            env=self._folder.enter_context(launch.session_folder(command, environ)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._texts: tuple[list[bytes], list[bytes]] = ([], [])
        pipes = zip((self.process.stdout, self.process.stderr), self._texts, strict=True)
        self._readers = [threading.Thread(target=self._read, args=each, daemon=True) for each in pipes]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(pipe, into: list[bytes]) -> None:
        while data := os.read(pipe.fileno(), 65536):
            into.append(data)

    @property
    def out(self) -> str:
        return b"".join(self._texts[0]).decode(errors="replace")

    @property
    def err(self) -> str:
        return b"".join(self._texts[1]).decode(errors="replace")

    def wait_for(self, pattern: str, times: int = 1, timeout: float = 240) -> list[str]:
        """Wait until standard output holds so many matches of `pattern`, and return them; fails when they don't come.

        Ranks write at the same time, so lines may run into each other.
        """
        end = time.monotonic() + timeout
        ended = False
        while len(found := re.findall(pattern, self.out)) < times:
            assert time.monotonic() < end, f"{pattern!r} came {len(found)} times:\n{self.out}\n{self.err}"
            assert not ended, f"ended:\n{self.out}\n{self.err}"
            time.sleep(0.02)
            if self.process.poll() is not None:
                ended = True
                self._join()  # what it wrote last is looked at
        return found

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 240) -> Ended:
        """Wait for the end; a program that goes on for longer is a failure, not a hang."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.out}\n{self.err}") from None
        self._join()
        return Ended(code, self.out, self.err, time.monotonic() - self.begin)

    def _join(self) -> None:
        for reader in self._readers:
            reader.join(5)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        for pid in launch.session_members(self.process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        self._folder.close()


def mpirun_line(n_ranks: int, command: list[str]) -> list[str]:
    """The command line that runs `command` on so many ranks of this machine."""
    starter = launch.find_mpirun(None, os.environ)
    version = subprocess.run([starter[0], "--version"], capture_output=True, text=True, check=True).stdout
    return [*starter, *launch.mpirun_options(version, n_ranks, {}), "-n", str(n_ranks), *command]


def program(name: str, *arguments: str) -> list[str]:
    """The command line of one of the small programs beside this file."""
    return [sys.executable, str(PROGRAMS / f"{name}.py"), *arguments]


def run(command: list[str], env: dict[str, str] | None = None, timeout: float = 240) -> Ended:
    """Run a program to its end."""
    with Running(command, env) as running:
        return running.wait(timeout)


def alive(pids: list[int]) -> list[int]:
    """Those of these processes that still run (a zombie does not)."""
    return [pid for pid in pids if _state(pid) not in ("", "Z", "X")]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
