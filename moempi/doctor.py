"""What of this machine is fine for moempi, and what to do about the rest.

One function per question, each returning a `Finding`; those that decide something are pure and are given what was
found. Importing this loads neither torch nor mpi4py, and `examine` starts no MPI.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import moempi
from moempi.errors import MoempiError

FINE, NOTE, WRONG = "fine", "note", "wrong"

NEEDED = ("torch", "numpy", "h5py", "mpi4py", "tokenizers", "safetensors", "pydantic", "click", "rich")
OPTIONAL = {"matplotlib": "moempi[plot]"}
SHARED_MEMORY_WANTED = 64 * 2**20  # bytes of /dev/shm for the messages of one rank of a node


@dataclass(frozen=True)
class Finding:
    """One line of the report. `advice` is what to do; empty where all is fine."""

    subject: str
    state: str  # FINE; NOTE: works, but you should know; WRONG: a job would fail
    found: str
    advice: str = ""


def examine(environ: Mapping[str, str]) -> list[Finding]:
    """Everything that one process can see without starting MPI."""
    library, launcher = find_library(), find_launcher(environ)
    return [
        Finding("moempi", FINE, f"{moempi.__version__}, Python {platform.python_version()}, {system()}"),
        packages(installed_version),
        pictures(installed_version),
        products(),
        library,
        launcher,
        same_kind(library, launcher),
        hdf5(),
        gpu(_lines_of("nvidia-smi", "-L"), _missing_for_gpus()),
        slurm(shutil.which("sbatch"), _lines_of("sbatch", "--version"), _lines_of("srun", "--mpi=list"), environ),
    ]


# ---------------------------------------------------------------- software


def system() -> str:
    """Operating system and kind of processor."""
    return f"{platform.system()} {platform.release().split('-')[0]} on {platform.machine()}"


def installed_version(name: str) -> str | None:
    """The version of an installed package; None where it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def packages(version_of: Callable[[str], str | None]) -> Finding:
    """The libraries that moempi needs."""
    versions = {name: version_of(name) for name in NEEDED}
    missing = [name for name, version in versions.items() if version is None]
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if missing:
        return Finding(
            "libraries", WRONG, f"{', '.join(missing)} not installed; {found}", f"pip install {' '.join(missing)}"
        )
    return Finding("libraries", FINE, found)


def pictures(version_of: Callable[[str], str | None]) -> Finding:
    """What only `moempi trace plot` needs."""
    missing = [name for name in OPTIONAL if version_of(name) is None]
    if missing:
        ways = ", ".join(f"pip install '{OPTIONAL[name]}'" for name in missing)
        return Finding("pictures", NOTE, f"no {', '.join(missing)}; only `moempi trace plot` needs it", ways)
    return Finding("pictures", FINE, ", ".join(f"{name} {version_of(name)}" for name in OPTIONAL))


def products() -> Finding:
    """Whether this processor and build of torch have the products that exact mode stands on."""
    try:
        import torch

        from moempi.device.cpu import Cpu
        from moempi.device.seam import ProductShape

        device = Cpu(1)
        device.choose_products([ProductShape(1024, 1024, dtype, dtype) for dtype in (torch.float32, torch.bfloat16)])
        processor = torch.backends.cpu.get_cpu_capability()
    except (ImportError, OSError, MoempiError) as error:
        return Finding("products", WRONG, str(error), "install a build of torch that fits this processor")
    if device.products == "kernels":
        return Finding("products", FINE, f"moempi's own kernels multiply ({processor})")
    if device.products == "packed":
        return Finding("products", FINE, f"packed oneDNN products keep a row's bits ({processor})")
    if device.products == "pieces":
        return Finding("products", FINE, f"packed oneDNN products keep a row's bits in short pieces ({processor})")
    return Finding(
        "products",
        NOTE,
        f"packed oneDNN products do not keep a row's bits here ({processor}); padded tiles take their place, slower",
        "another build of torch may have them; results stay right",
    )


def hdf5() -> Finding:
    """The HDF5 library that h5py brings."""
    try:
        import h5py
    except ImportError as error:
        return Finding("HDF5", WRONG, f"h5py cannot be loaded: {error}", "pip install --force-reinstall h5py")
    found = f"HDF5 {h5py.version.hdf5_version}, h5py {h5py.version.version}, "
    if h5py.get_config().mpi:
        return Finding("HDF5", FINE, found + "an MPI build (not needed: only rank 0 and threads write, each its own)")
    return Finding("HDF5", FINE, found + "a serial build, all that moempi needs")


# ---------------------------------------------------------------- MPI


def find_library() -> Finding:
    """The MPI library that mpi4py loads."""
    from moempi.mpi import library_version

    try:
        # Open MPI tells who built it, where and when; the number is what counts.
        return Finding("MPI library", FINE, library_version().split(", package:")[0])
    except MoempiError as error:
        found, _, way = str(error).partition(". ")
        return Finding("MPI library", WRONG, found, way)


def find_launcher(environ: Mapping[str, str]) -> Finding:
    """The mpirun that `moempi run -n` would start."""
    from moempi.launch import find_mpirun

    try:
        command = find_mpirun(None, environ)
    except MoempiError as error:
        found, _, way = str(error).partition(". ")
        return Finding("launcher", WRONG, found, way)
    said = _lines_of(*command, "--version")
    if not said:
        return Finding("launcher", WRONG, f"{command[0]} --version says nothing", "name another one with MOEMPI_MPIRUN")
    return Finding("launcher", FINE, f"{said[0]} ({command[0]})")


def same_kind(library: Finding, launcher: Finding) -> Finding:
    """Whether library and launcher belong together; otherwise each rank is alone in a world of one."""
    kinds = [_kind(each.found) if each.state == FINE else "" for each in (library, launcher)]
    if not all(kinds):
        return Finding("MPI as a whole", NOTE, "cannot tell whether library and launcher belong together", TRY_RANKS)
    if kinds[0] != kinds[1]:
        return Finding(
            "MPI as a whole",
            WRONG,
            f"the library is {kinds[0]}, the launcher {kinds[1]}: each rank would be alone in a world of one",
            "name the mpirun of the library with MOEMPI_MPIRUN, or the library of the mpirun with MPI4PY_LIBMPI",
        )
    return Finding("MPI as a whole", FINE, f"library and launcher are both {kinds[0]}; {TRY_RANKS}")


TRY_RANKS = "`moempi doctor -n 2` starts ranks"


def _kind(text: str) -> str:
    """The family of an MPI, from what it says of itself; empty where it is none of the known ones."""
    if re.search(r"Open ?MPI|OpenRTE|PRTE|prterun", text, re.IGNORECASE):
        return "Open MPI"
    return "MPICH" if re.search(r"MPICH|HYDRA|Intel|MVAPICH|Cray", text, re.IGNORECASE) else ""


@dataclass(frozen=True)
class RankReport:
    """What a rank says of itself."""

    host: str
    node: int
    cores: int  # that it may run on
    threads: int  # that `run.threads = "auto"` gives it
    shared_memory: int  # bytes free in /dev/shm; -1: there is none


def this_rank(node: int, threads: int) -> RankReport:
    """The report of this process."""
    shared = Path("/dev/shm")
    free = shutil.disk_usage(shared).free if shared.is_dir() else -1
    return RankReport(platform.node(), node, len(os.sched_getaffinity(0)), threads, free)


def ranks(reports: Sequence[RankReport], largest_tag: int) -> list[Finding]:
    """What the ranks of a world say together."""
    per_node = Counter(each.node for each in reports)
    hosts = {each.node: each.host for each in reports}
    shown = [f"{n} on {hosts[node]}" for node, n in sorted(per_node.items())]
    listed = ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")
    met = f"{_plural(len(reports), 'rank')} on {_plural(len(per_node), 'node')} met"
    found = f"{met}: {listed}; tags to {largest_tag:,}"
    return [Finding("ranks", FINE, found), _cores(reports, per_node), _shared_memory(reports, per_node)]


def _cores(reports: Sequence[RankReport], per_node: Mapping[int, int]) -> Finding:
    least = min(reports, key=lambda each: each.cores)
    threads = sorted({each.threads for each in reports})
    found = f"a rank may run on {_range([each.cores for each in reports])} cores and takes {_threads(threads)}"
    crowded = max(reports, key=lambda each: per_node[each.node] / each.cores)
    n = per_node[crowded.node]
    if least.cores == 1 and n > 1 and n <= (os.cpu_count() or 1):
        return Finding("cores", NOTE, found, "ranks may be bound to single cores: mpirun --bind-to none, or more cores")
    if n > crowded.cores:
        return Finding(
            "cores",
            NOTE,
            f"{found}; {n} ranks share {crowded.cores} cores of {crowded.host}",
            "right for trying a layout, slow for work: there, at most a rank per core",
        )
    return Finding("cores", FINE, found)


def _shared_memory(reports: Sequence[RankReport], per_node: Mapping[int, int]) -> Finding:
    tight = min(reports, key=lambda each: each.shared_memory / per_node[each.node])
    wanted = SHARED_MEMORY_WANTED * per_node[tight.node]
    found = f"{tight.shared_memory / 2**20:,.0f} MiB free in /dev/shm of {tight.host}"
    if tight.shared_memory < 0:
        return Finding("shared memory", NOTE, f"no /dev/shm on {tight.host}", "MPI may be slower inside the node")
    if per_node[tight.node] > 1 and tight.shared_memory < wanted:
        way = f"{per_node[tight.node]} ranks may want {wanted // 2**20:,} MiB; a container takes --shm-size"
        return Finding("shared memory", NOTE, found, way)
    return Finding("shared memory", FINE, found)


# ---------------------------------------------------------------- GPU and scheduler


def gpu(listed: list[str], missing: str) -> Finding:
    """GPUs that the driver lists, and whether jobs can use them.

    Args:
        missing: what stands in their way; empty: nothing.
    """
    devices = [line for line in listed if line.startswith("GPU")]
    if not devices:
        return Finding("GPU", FINE, "none found: jobs run on the CPU")
    found = f"{_plural(len(devices), 'GPU')} ({devices[0].split('(')[0].strip()})"
    if missing:
        reason, _, way = missing.partition(": ")
        return Finding("GPU", NOTE, f"{found}, but {reason}: jobs run on the CPU", way)
    return Finding("GPU", FINE, found)


def _missing_for_gpus() -> str:
    try:
        from moempi.device.cuda_binding import why_not_here
    except (ImportError, OSError) as error:
        return str(error)
    return why_not_here()


def gpu_messages(rates: Mapping[str, Sequence[float]], problem: str) -> Finding:
    """Whether MPI takes the memory of GPUs, and how fast every two ranks swap it.

    Args:
        rates: GB/s of every size that was tried, one way, by pair of ranks ("0-1"); empty where it did not work.
        problem: what happened then.
    """
    if problem:
        found = f"MPI does not move GPU memory between ranks ({problem}): rows are staged through the host, slowly"
        return Finding("GPU messages", NOTE, found, "pip install 'moempi[cuda]', or load the site's CUDA-aware MPI")
    shown = ", ".join(f"{pair} {max(each):.3g} GB/s" for pair, each in rates.items())
    return Finding("GPU messages", FINE, f"CUDA-aware; one way, both ways at once, between ranks {shown}")


def try_gpu_messages(n_ranks: int) -> list[Finding]:
    """Start ranks that send each other GPU memory; nothing where there are no GPUs to use."""
    if n_ranks < 2 or _missing_for_gpus():
        return []
    from moempi.exchange.gpu_trial import start

    return [gpu_messages(*start(n_ranks))]


def slurm(program: str | None, sbatch: list[str], mpi_list: list[str], environ: Mapping[str, str]) -> Finding:
    """Slurm, and which ways of starting MPI its srun knows.

    Args:
        program: path of sbatch; None where there is none.
        sbatch, mpi_list: what `sbatch --version` and `srun --mpi=list` print; nothing where they fail.
    """
    if program and not sbatch:
        way = "run `sbatch --version` to see why; `moempi run -n` and mpirun need no Slurm"
        return Finding("Slurm", NOTE, f"{program} is there but fails", way)
    if not sbatch:
        return Finding("Slurm", FINE, "not here; `moempi run -n` and mpirun need none")
    kinds = [line.strip() for line in mpi_list if re.fullmatch(r"\s*[\w./-]+\s*", line)]
    inside = f"; inside job {environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in environ else ""
    found = f"{sbatch[0]}{inside}; srun --mpi= knows {', '.join(kinds) or 'nothing'}"
    if not any(kind.startswith("pmix") for kind in kinds):
        return Finding("Slurm", NOTE, found, "srun has no pmix for an Open MPI: start ranks with mpirun inside the job")
    return Finding("Slurm", FINE, found)


def _lines_of(*command: str) -> list[str]:
    """What a command prints; nothing where it is not there, fails or hangs."""
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return []
    return (done.stdout + done.stderr).splitlines() if done.returncode == 0 else []


def _plural(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _range(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _threads(values: Sequence[int]) -> str:
    return _plural(values[0], "thread") if len(values) == 1 else f"{_range(values)} threads"
