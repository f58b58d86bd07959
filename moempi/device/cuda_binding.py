"""Which GPU a rank takes, and what stands in the way of one. Nothing here starts CUDA by being imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from moempi.errors import JobError


def why_not_here() -> str:
    """Why this process cannot use a GPU, with what to do; empty where it can."""
    # Without CUDA the version is None, whatever the type says.
    built: str | None = torch.version.cuda
    return why_not(torch.__version__, built, seen=torch.cuda.is_available(), cupys=installed_cupys())


def why_not(torch_version: str, torch_cuda: str | None, *, seen: bool, cupys: Mapping[str, str]) -> str:
    """Why a process cannot use a GPU, with what to do; empty where it can. Pure.

    Args:
        torch_cuda: the CUDA that torch is built for, "13.0"; None: it is built without.
        seen: torch sees a GPU.
        cupys: installed distributions of cupy, {name: version}.
    """
    if torch_cuda is None:
        return f"this torch ({torch_version}) is built without CUDA: install a CUDA build of it"
    if not seen:
        return "torch sees no GPU: look at nvidia-smi and at CUDA_VISIBLE_DEVICES"
    major = torch_cuda.split(".")[0]
    wanted = f"cupy-cuda{major}x"
    shown = " and ".join(f"{name} {version}" for name, version in sorted(cupys.items()))
    if not cupys:
        return f"there is no cupy: pip install {wanted} (torch {torch_version} is built for CUDA {torch_cuda})"
    if len(cupys) > 1:
        names = " ".join(sorted(cupys))
        return f"{shown} are installed and overwrite each other: pip uninstall {names}, then pip install {wanted}"
    (name,) = cupys
    found = re.fullmatch(r"cupy-cuda(\d+)x", name)
    # A cupy that was built on this machine has no CUDA in its name, and is taken as it is.
    if found and found[1] != major:
        return (
            f"{shown} is built for CUDA {found[1]}, but torch {torch_version} for CUDA {torch_cuda}: "
            f"pip uninstall {name}, then pip install {wanted}"
        )
    return ""


def installed_cupys() -> dict[str, str]:
    """Installed distributions of cupy, {name: version}; importing one of another CUDA could fail in any way."""
    names = ["cupy", *(f"cupy-cuda{major}x" for major in range(11, 20))]
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def refuse_allocators(environ: Mapping[str, str]) -> None:
    """Refuse torch allocators whose memory MPI cannot pass between processes.

    Raises:
        JobError: naming the variable and its value.
    """
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        value = environ.get(name, "").replace(" ", "")
        if "expandable_segments:True" in value or "backend:cudaMallocAsync" in value:
            raise JobError(
                f"{name} = {environ[name]!r}: MPI cannot hand such memory to another process and falls back to slow "
                "copies without a word; unset it, or set exchange.gpu_aware = 'off'"
            )


def gpu_index(local_rank: int, n_local: int, n_gpus: int, *, share: bool) -> int:
    """The GPU of a rank: one each, or taking turns where GPUs may be shared.

    Raises:
        JobError: fewer GPUs than ranks on the node.
    """
    if n_local > n_gpus and not share:
        raise JobError(
            f"{n_local} ranks on this node, but {n_gpus} GPU{'s' if n_gpus != 1 else ''} that they can see: start "
            f"{n_gpus} ranks per node, or set run.share_gpus = true, or run.device = 'cpu'"
        )
    return local_rank % n_gpus
