"""What the GPU path decides without a GPU: blocks of memory, which GPU a rank takes, what MPI needs, who goes where."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest

from moempi.device.arena import ALIGNMENT, Arena, aligned
from moempi.device.cuda_binding import gpu_index, refuse_allocators
from moempi.errors import JobError
from moempi.exchange import gpu_mpi


def test_blocks_are_taken_first_fit_and_join_again() -> None:
    arena = Arena(1024, 4 * ALIGNMENT)
    first, second, third = arena.take(1), arena.take(ALIGNMENT + 1), arena.take(ALIGNMENT)
    assert (first, second, third) == (1024, 1024 + ALIGNMENT, 1024 + 3 * ALIGNMENT)
    assert arena.take(1) is None and arena.in_use == 4 * ALIGNMENT
    arena.give(1024)
    arena.give(1024 + 3 * ALIGNMENT)
    assert arena.take(2 * ALIGNMENT) is None, "two free blocks that do not touch are not one"
    arena.give(1024 + ALIGNMENT)
    assert arena.take(4 * ALIGNMENT) == 1024


def test_blocks_never_overlap_and_an_empty_arena_is_whole() -> None:
    rng = random.Random(3)
    arena, held = Arena(0, 100 * ALIGNMENT), {}
    for _ in range(3000):
        if held and rng.random() < 0.5:
            begin = rng.choice(list(held))
            del held[begin]
            arena.give(begin)
        else:
            size = rng.randint(1, 20 * ALIGNMENT)
            begin = arena.take(size)
            if begin is not None:
                assert all(begin + size <= b or b + s <= begin for b, s in held.items())
                held[begin] = size
        assert arena.in_use == sum(map(aligned, held.values()))
    for begin in held:
        arena.give(begin)
    assert arena.take(100 * ALIGNMENT) == 0


def test_what_never_fits_and_what_was_never_taken_are_errors() -> None:
    arena = Arena(0, ALIGNMENT)
    with pytest.raises(ValueError, match="1024 bytes in an arena of 512"):
        arena.take(ALIGNMENT + 1)
    with pytest.raises(KeyError):
        arena.give(0)


def test_a_gpu_each_or_in_turns() -> None:
    assert [gpu_index(rank, 4, 4, share=False) for rank in range(4)] == [0, 1, 2, 3]
    assert [gpu_index(rank, 5, 2, share=True) for rank in range(5)] == [0, 1, 0, 1, 0]
    with pytest.raises(JobError, match=r"3 ranks on this node, but 2 GPUs .* run\.share_gpus = true"):
        gpu_index(0, 3, 2, share=False)


VALUES = ["expandable_segments:True", "a:1, expandable_segments: True", "backend:cudaMallocAsync"]


@pytest.mark.parametrize("value", VALUES)
def test_allocators_that_mpi_cannot_share_are_refused(value: str) -> None:
    with pytest.raises(JobError, match=r"PYTORCH_CUDA_ALLOC_CONF = .*exchange\.gpu_aware = 'off'"):
        refuse_allocators({"PYTORCH_CUDA_ALLOC_CONF": value})
    refuse_allocators({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"})


def test_a_child_may_start_a_launcher_of_its_own() -> None:
    kept = {"PATH": "/bin", "OMPI_MCA_pml": "ucx", "UCX_TLS": "sm"}
    launcher = {"OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "1", "PRTE_X": "1", "OMPI_MCA_ess_base_vpid": "1"}
    assert gpu_mpi.child_environment(kept | launcher) == kept


def test_mpi_that_is_loaded_already_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", np)
    environ: dict[str, str] = {}
    assert "loaded before" in gpu_mpi.prepare(environ) and not environ


def test_a_sites_own_mpi_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    monkeypatch.setenv("MPI4PY_LIBMPI", "/site/libmpi.so")
    environ: dict[str, str] = {}
    assert "site's own MPI" in gpu_mpi.prepare(environ) and not environ
