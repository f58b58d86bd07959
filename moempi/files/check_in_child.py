"""Files from strangers are walked in a child process first, because a damaged one can crash the HDF5 library itself.

    python -m moempi.files.check_in_child FILE...      # the child; exit code 3 and a message where one is refused

The child may take so much memory and time and no more. It opens a file as the readers do, and reads every attribute,
the small datasets whole, and the first and last rows of the others. Tensors in bfloat16 are only measured: they are not
compressed, so that their numbers cannot harm the library.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import h5py

from moempi.errors import DataError, MoempiError
from moempi.files import schema

MEMORY = 2**31  # bytes that the child may map beyond what it has at its start
SECONDS = 60
FEW = 2**26  # bytes of a dataset that is read whole


def check_in_child(paths: Sequence[Path], seconds: int = SECONDS, memory: int = MEMORY) -> None:
    """Walk HDF5 files of any kind of this program in a child process; returns where all are sound.

    Args:
        seconds: that the child may take for each file.
        memory: bytes that it may map beyond what it has at its start.

    Raises:
        DataError: a file is refused, or the child crashed or ran out of time at it.
    """
    if not paths:
        return
    words = [sys.executable, "-m", "moempi.files.check_in_child", str(seconds), str(memory), *map(str, paths)]
    # The child finds the same package, wherever this one was imported from.
    found = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = os.environ | {"PYTHONPATH": found}
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", env=environ)
    if done.returncode == DataError.exit_code:
        raise DataError(done.stderr.strip())
    if done.returncode:
        raise DataError(_how_it_ended(done, paths))


def _how_it_ended(done: subprocess.CompletedProcess[str], paths: Sequence[Path]) -> str:
    number = max(0, len(done.stdout.splitlines()) - 1)
    if done.returncode == -signal.SIGALRM:
        what = "took too long"
    elif done.returncode < 0:
        what = f"crashed the HDF5 library ({signal.Signals(-done.returncode).name})"
    else:
        what = f"failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no reason given'}"
    return f"{paths[number]}: reading it in a child process {what}; it is damaged, don't open it"


def walk(path: Path) -> None:
    """Open a file of any kind and read what a reader may; for the child.

    Raises:
        DataError: it is refused.
    """
    with schema.open_file(path, kind_of(path)) as file:
        _read_attributes(file)
        file.visititems(lambda name, item: _read(item))


def kind_of(path: Path) -> str:
    """Which kind of file this says that it is, one of `schema.VERSIONS`.

    Raises:
        DataError: no HDF5, or none of them.
    """
    schema.refuse_irregular(path)
    try:
        with h5py.File(path, "r") as file:
            found = schema.text_attribute(file, "format").removeprefix("moempi-")
    except schema.DAMAGE as error:
        raise DataError(f"{path}: cannot be opened as HDF5 (truncated, or not HDF5): {error}") from None
    if found not in schema.VERSIONS:
        raise DataError(f"{path}: format is {found or 'not given'!r}; expected one of {', '.join(schema.VERSIONS)}")
    return found


def _read(item: h5py.HLObject) -> None:
    _read_attributes(item)
    if not isinstance(item, h5py.Dataset):
        return
    if item.dtype.kind not in "iuf" or not item.shape or not item.size:
        return
    # Numpy has no bfloat16: HDF5 would turn it into float32, number by number. Such tensors are only measured.
    if item.id.get_type() == schema.BFLOAT16:
        return
    if item.nbytes <= FEW:
        item[...]
    else:
        item[:1], item[-1:]


def _read_attributes(item: h5py.HLObject) -> None:
    for name in item.attrs:
        item.attrs[name]


def main(arguments: Sequence[str]) -> int:
    """The child: walk the files under limits; says which one it begins with on standard output."""
    seconds, memory, *paths = arguments
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 2**18
    most = pages * os.sysconf("SC_PAGE_SIZE") + int(memory)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for path in paths:
        # Left to the system: a library that hangs never returns to Python.
        signal.alarm(int(seconds))
        print(path.replace("\n", " "), flush=True)
        try:
            walk(Path(path))
        except MoempiError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
