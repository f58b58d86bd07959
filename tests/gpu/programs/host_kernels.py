"""The code of the row kernels, compiled for the host: what `cuda_rows` launches where there is no GPU, for tests.

A kernel that waits for others (a barrier, a shuffle) is a fiber (host_cuda.h); products, attention and everything that
is not a row kernel is the emulated GPU's.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import emulated_gpu

SHIM = Path(__file__).with_name("host_cuda.h")
COMPILER = "g++"
LAUNCHED: set[str] = set()  # names of kernels
OPTIONS = "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-unknown-pragmas"


def install() -> None:
    """Put an emulated GPU in the place of CUDA, whose row kernels are these; before anything that needs one."""
    emulated_gpu.install(late=False)
    from moempi.device import cuda_rows

    cuda_rows._kernel = kernel  # type: ignore[assignment]


class HostKernel:
    """Stands for `moempi.device.cuda_launch.Kernel`."""

    def __init__(self, name: str, run: Callable[..., None], n_parameters: int, words: int):
        self._name, self._run, self._is_struct = name, run, words > 1
        self._values = (ctypes.c_int64 * (n_parameters - 1 + words))()

    def __call__(self, blocks: int, threads: int, values: list[Any], shared: int = 0) -> None:
        """Launch, and wait for it."""
        if self._is_struct:
            self._values[: len(values)] = values
        else:
            self._values[:] = values
        LAUNCHED.add(self._name)
        self._run(self._values, len(self._values), blocks, threads, shared)


def never_launched() -> set[str]:
    """Names of kernels."""
    from moempi.device import cuda_rows

    return set(cuda_rows.names()) - LAUNCHED


def kernel(name: str, n_parameters: int, words: int = 1) -> HostKernel:
    """Stands for `cuda_rows._kernel`."""
    from moempi.device import cuda_rows

    return HostKernel(name, getattr(_library(), f"run_{cuda_rows.names().index(name)}"), n_parameters, words)


@cache
def _library() -> ctypes.CDLL:
    """All instances."""
    from moempi.device import cuda_rows

    code = cuda_rows.source()
    for shared in ("turned", "shared"):  # which have their size from the launch
        declared = f"extern __shared__ float {shared}[];"
        assert declared in code
        code = code.replace(declared, f"float* {shared} = host::dynamic_shared();")
    runs = [
        f'extern "C" void run_{i}(const int64_t* words, int n_words, int blocks, int threads, int shared) '
        f"{{ host::launch({name}, words, n_words, blocks, threads, shared); }}"
        for i, name in enumerate(cuda_rows.names())
    ]
    text = "\n".join([SHIM.read_text(), code, *runs])
    with tempfile.TemporaryDirectory(prefix="moempi-kernels-") as folder:
        program, library = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
        program.write_text(text)
        subprocess.run([COMPILER, *OPTIONS, str(program), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))
