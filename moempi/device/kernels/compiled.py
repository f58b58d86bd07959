"""The kernels as functions to call, compiled once per machine and kept in the user's cache folder.

The first run on a machine compiles with numba, which takes some seconds; the machine code is kept as one object file,
and later runs load it with llvmlite alone, in milliseconds. Another version of the kernels, of numba or of the
processor is another file.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

# Of every kernel: which parameters are whole numbers (i), and which are float32 (f).
_PARAMETERS = {
    "norm": "iiiifi",
    "product": "i" * 8,
    "wide_product": "i" * 9,
    "experts": "i" * 6,
    "swiglu": "i" * 4,
    "turn_heads": "i" * 16 + "ff",
    "attend": "i" * 14,
    "choose_experts": "i" * 8,
    "combine": "i" * 8,
}
# numba's code names these for exceptions, which the kernels have none of.
_NEVER_CALLED = (
    "numba_gil_ensure", "numba_gil_release", "numba_unpickle", "numba_runtime_build_excinfo_struct", "numba_do_raise",
    "NRT_Free",
)  # fmt: skip
_ctypes: dict[str, Any] = {"i": ctypes.c_int64, "f": ctypes.c_float}


class Kernels:
    """The kernels for rows of one dtype, each a function of addresses and sizes."""

    norm: Callable[..., None]
    product: Callable[..., None]
    wide_product: Callable[..., None]
    experts: Callable[..., None]
    swiglu: Callable[..., None]
    turn_heads: Callable[..., None]
    attend: Callable[..., None]
    choose_experts: Callable[..., None]
    combine: Callable[..., None]

    def __init__(self, code: bytes, half: bool):
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        abort = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value
        for name in _NEVER_CALLED:
            llvm.add_symbol(name, abort)
        target = llvm.Target.from_default_triple()
        machine = target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=_features(), jit=True)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        for name, parameters in _parameters(half).items():
            kind = ctypes.CFUNCTYPE(None, *(_ctypes[p] for p in parameters))
            setattr(self, name, kind(self._engine.get_function_address(name)))


@lru_cache(maxsize=2)
def kernels(half: bool) -> Kernels:
    """The kernels for bfloat16 rows (`half`) or float32 rows; compiled first where this machine has not done so."""
    return Kernels(_object_code(half), half)


def has_wide_product(half: bool) -> bool:
    """Whether there is a `wide_product` of E, and no library is faster: AMX multiplies bfloat16 where there is that."""
    features = llvm.get_host_cpu_features()
    if half:
        return features.get("avx512bf16", False) and not features.get("amx-bf16", False)
    return features.get("avx512f", False)


def _parameters(half: bool) -> dict[str, str]:
    return {name: kinds for name, kinds in _PARAMETERS.items() if name != "wide_product" or has_wide_product(half)}


def _object_code(half: bool) -> bytes:
    path = cache_folder() / f"kernels-{'bfloat16' if half else 'float32'}-{_key()}.o"
    with suppress(OSError):
        return path.read_bytes()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / "lock").open("w") as lock:
            # One rank compiles, the others of the node wait for it.
            fcntl.flock(lock, fcntl.LOCK_EX)
            with suppress(OSError):
                return path.read_bytes()
            code = compile_kernels(half)
            _write(path, code)
            return code
    except OSError:
        return compile_kernels(half)  # a folder that cannot be written to costs each rank the time


def cache_folder() -> Path:
    """Where compiled kernels are kept: `$XDG_CACHE_HOME/moempi`, or `~/.cache/moempi`."""
    home = Path(os.environ.get("HOME") or tempfile.gettempdir())
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "moempi"


def _write(path: Path, code: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(code)
    Path(file.name).replace(path)


def _key() -> str:
    """Everything that the machine code depends on, as a short digest."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for text in (version("numba"), version("llvmlite"), llvm.get_host_cpu_name(), _features()):
        digest.update(text.encode())
    return digest.hexdigest()[:20]


def _features() -> str:
    return llvm.get_host_cpu_features().flatten()


def compile_kernels(half: bool) -> bytes:
    """Compile all kernels for one dtype into an object file."""
    # Without this numba has colorama reset the terminal at the program's end, behind what `--json` has printed.
    os.environ.setdefault("NUMBA_DISABLE_ERROR_MESSAGE_HIGHLIGHTING", "1")
    # numba takes a fifth of a second to import, which later runs do without.
    from numba import cfunc, types

    from moempi.device.kernels import attention, elements, products, rows, wide

    kinds = {"i": types.int64, "f": types.float32}
    builders: dict[str, Any] = vars(attention) | vars(products) | vars(rows) | vars(wide)
    e = elements.elements(half)
    module = llvm.parse_assembly("")
    for name, parameters in _parameters(half).items():
        kernel = builders[f"build_{name}"](e)
        compiled: Any = cfunc(types.void(*(kinds[p] for p in parameters)), error_model="numpy")(kernel)
        text = compiled._library.get_llvm_str().replace(compiled._wrapper_name, name)
        module.link_in(llvm.parse_assembly(text))
    target = llvm.Target.from_triple(module.triple or llvm.get_default_triple())
    machine = target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=_features(), opt=3, reloc="pic", codemodel="default"
    )
    code: bytes = machine.emit_object(module)
    return code
