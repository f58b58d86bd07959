"""What the GPU path decides without a GPU: blocks of memory, which GPU a rank takes, what MPI needs, who goes where."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest

from moempi.device import cuda_binding
from moempi.device.arena import ALIGNMENT, Arena, aligned
from moempi.device.cuda_binding import gpu_index, installed_cupys, refuse_allocators, why_not
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


CUPY = {"cupy-cuda13x": "14.2.0"}


@pytest.mark.parametrize(
    ("torch_cuda", "seen", "cupys", "expected"),
    [
        ("13.0", True, CUPY, ""),
        ("13.0", True, {"cupy": "14.2.0"}, ""),  # built on the machine itself
        ("12.8", True, {"cupy-cuda12x": "13.6.0"}, ""),
        (None, False, CUPY, "this torch (2.11.0) is built without CUDA: install a CUDA build of it"),
        ("13.0", False, CUPY, "torch sees no GPU: look at nvidia-smi and at CUDA_VISIBLE_DEVICES"),
        ("13.0", True, {}, "there is no cupy: pip install cupy-cuda13x (torch 2.11.0 is built for CUDA 13.0)"),
        (
            "13.0", True, {"cupy-cuda12x": "13.6.0"},
            "cupy-cuda12x 13.6.0 is built for CUDA 12, but torch 2.11.0 for CUDA 13.0: "
            "pip uninstall cupy-cuda12x, then pip install cupy-cuda13x",
        ),
        (
            "12.8", True, CUPY,
            "cupy-cuda13x 14.2.0 is built for CUDA 13, but torch 2.11.0 for CUDA 12.8: "
            "pip uninstall cupy-cuda13x, then pip install cupy-cuda12x",
        ),
        (
            "13.0", True, {**CUPY, "cupy-cuda12x": "13.6.0"},
            "cupy-cuda12x 13.6.0 and cupy-cuda13x 14.2.0 are installed and overwrite each other: "
            "pip uninstall cupy-cuda12x cupy-cuda13x, then pip install cupy-cuda13x",
        ),
    ],
)  # fmt: skip
def test_what_stands_in_the_way_of_a_gpu(
    torch_cuda: str | None, seen: bool, cupys: dict[str, str], expected: str
) -> None:
    assert why_not("2.11.0", torch_cuda, seen=seen, cupys=cupys) == expected


def test_installed_cupys_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version in {"cupy_cuda12x": "13.6.0", "cupy_plots": "1.0"}.items():
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    before = installed_cupys()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installed_cupys() == {**before, "cupy-cuda12x": "13.6.0"}


def test_a_torch_without_cuda_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_binding.torch.version, "cuda", None)
    assert cuda_binding.why_not_here() == why_not(cuda_binding.torch.__version__, None, seen=False, cupys={})


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


def test_an_mpi_that_was_not_made_ready_is_not_given_a_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end the process; a child's MPI, which is made ready, says nothing of it."""
    monkeypatch.setattr(gpu_mpi, "embedded", lambda: True)
    monkeypatch.setattr(gpu_mpi, "_ready", False)
    monkeypatch.setattr(gpu_mpi, "find_ucx", lambda: None)
    assert "without the wheel libucx-cu13" in gpu_mpi.why_not_ready()
    monkeypatch.setattr(gpu_mpi, "find_ucx", lambda: Path("/ucx"))
    assert "loaded before" in gpu_mpi.why_not_ready()
    monkeypatch.setattr(gpu_mpi, "_ready", True)
    assert gpu_mpi.why_not_ready() == ""
    monkeypatch.setattr(gpu_mpi, "_ready", False)
    monkeypatch.setattr(gpu_mpi, "embedded", lambda: False)
    assert gpu_mpi.why_not_ready() == ""
