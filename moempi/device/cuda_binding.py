"""Which GPU a rank takes, and what stands in the way of one. Nothing here starts CUDA by being imported."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moempi.errors import JobError


def why_not() -> str:
    """Why this process cannot use a GPU, with what to do; empty where it can."""
    if not torch.backends.cuda.is_built():
        return f"this torch ({torch.__version__}) is built without CUDA: install a CUDA build of it"
    if not torch.cuda.is_available():
        return "torch sees no GPU: look at nvidia-smi and at CUDA_VISIBLE_DEVICES"
    return ""


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
