"""What all HDF5 files of the project share: format and version, text, bfloat16, checks, atomic creation.

Every file has the root attributes `format`, `version`, `creator` and `created`, and `/sources` and
`/environment` as JSON text; files made by a job carry `/job`. Part files have no environment: the file that they
are merged into has. Text and bytes are uint8 datasets, and attributes are
numbers or fixed-length strings: variable-length types are neither written nor read, because damaged ones
can hang the HDF5 library where Python cannot interrupt it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import moempi
from moempi.errors import DataError
from moempi.files.safe import check_safe, is_refused
from moempi.files.sink import Sink

VERSIONS = {
    "inputs": 1,
    "weights": 1,
    "outputs": 1,
    "outputs-part": 1,
    "trace": 1,
    "trace-part": 1,
    "placement": 1,
    "links": 1,
}
COMPUTED = ("outputs", "trace")  # files whose numbers depend on the processor
# What the HDF5 1.10 tools of current distributions can still read.
LIBVER = ("earliest", "v110")
COMPRESSION: dict[str, Any] = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
CHUNK = 65536
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # of a file system that has no hard links
# What h5py and numpy raise for an object of another kind, type or shape than was asked for.
DAMAGE = (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, OverflowError)


def _bfloat16_type() -> h5py.h5t.TypeID:
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)  # sign, exponent and mantissa: bit positions and sizes
    kind.set_size(2)
    kind.set_ebias(127)
    return kind


BFLOAT16 = _bfloat16_type()


# ---------------------------------------------------------------- creating and opening


@contextmanager
def create(
    path: Path,
    kind: str,
    *,
    sources: Mapping[str, str] | None = None,
    job: str = "",
    made_by: str = "",
    before: Callable[[], None] = lambda: None,
    new: bool = False,
) -> Iterator[h5py.File]:
    """Write a file of `kind` under a temporary name; move it into place, synced, when the block ends well.

    Args:
        path: the final name; an existing file of that name is replaced at once or not at all.
        kind: a key of `VERSIONS`.
        sources: {name: SHA-256 in hex} of the files that this one is made from.
        job: the effective job, or what of it went into the file, as JSON text; "": the file is not made by a job.
        made_by: the environment that computed what goes into the file, as JSON text; "": this one.
        before: called when all is on the disk, right before the move; what it raises keeps the file from counting.
        new: a file of that name is an error, and stays.

    Raises:
        DataError: the file cannot be written (no such folder, disk full, ...), with the cause.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        sink = Sink(temporary)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        try:
            with h5py.File(sink, "w", libver=LIBVER) as file:
                _stamp(file, kind, sources or {})
                if not kind.endswith("-part"):
                    here = environment if kind in COMPUTED else builds
                    write_text(file, "environment", made_by or json.dumps(here(), indent=2))
                if job:
                    write_text(file, "job", job)
                yield file
        finally:
            sink.close()
            if sink.error:
                raise DataError(f"{path}: cannot be written: {sink.error.strerror}") from sink.error
        before()
        _put(temporary, path, new)
    finally:
        temporary.unlink(missing_ok=True)


def _put(temporary: Path, path: Path, new: bool) -> None:
    try:
        if new:
            move_new(temporary, path)
        else:
            temporary.replace(path)
        sync(path.parent)
    except FileExistsError:
        raise DataError(f"{path}: is there already; another run is writing the same output") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error


def move_new(source: Path, path: Path) -> None:
    """Give a file another name, which nothing else may have.

    Raises:
        FileExistsError: something has it.
    """
    try:
        os.link(source, path)
    except FileExistsError:
        # Where the answer of a file server is lost, the link is asked for twice.
        if not path.samefile(source):
            raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        source.rename(path)
        return
    source.unlink()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _stamp(file: h5py.File, kind: str, sources: Mapping[str, str]) -> None:
    set_text_attribute(file, "format", f"moempi-{kind}")
    file.attrs["version"] = VERSIONS[kind]
    set_text_attribute(file, "creator", f"moempi {moempi.__version__}")
    set_text_attribute(file, "created", datetime.now(UTC).isoformat(timespec="seconds"))
    write_text(file, "sources", json.dumps(dict(sources), indent=2))


@contextmanager
def open_file(path: Path, kind: str, *, walked: bool = False) -> Iterator[h5py.File]:
    """Open a file of `kind` for reading; every HDF5 error inside the block becomes a DataError that names it.

    Args:
        walked: its objects were looked at already, when it was opened before.

    Raises:
        DataError: missing, not HDF5, another format or version, or it holds a link or a type that is refused.
    """
    refuse_irregular(path)
    try:
        file = h5py.File(path, "r")
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; expected moempi {kind}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be opened as HDF5 (truncated, or not HDF5): {error}") from None
    with file:
        try:
            _check_stamp(file, path, kind)
            if not walked:
                check_safe(file, path)
            yield file
        except DAMAGE as error:
            raise DataError(f"{path}: damaged {kind} file: {error}") from error


def refuse_irregular(path: Path) -> None:
    """Refuse a folder, and a pipe or device, which would be waited for or read without end.

    Raises:
        DataError: naming it.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: cannot be opened as HDF5: it is no regular file")


def _check_stamp(file: h5py.File, path: Path, kind: str) -> None:
    found = text_attribute(file, "format")
    if found != f"moempi-{kind}":
        raise DataError(f"{path}: format is {found or 'not given'!r}; expected 'moempi-{kind}'")
    version = file.attrs.get("version")
    if not isinstance(version, np.integer) or version != VERSIONS[kind]:
        raise DataError(f"{path}: version {version} of moempi-{kind}; this program reads version {VERSIONS[kind]}")


# ---------------------------------------------------------------- text


def set_text_attribute(item: h5py.HLObject, name: str, text: str) -> None:
    """A short text (< 64 KiB) as a fixed-length UTF-8 attribute."""
    raw = text.encode()
    item.attrs.create(name, np.bytes_(raw), dtype=h5py.string_dtype("utf-8", max(1, len(raw))))


def text_attribute(item: h5py.HLObject, name: str) -> str:
    """The text of an attribute, or "" where there is none (or none that may be read)."""
    if name.encode() not in [h5py.h5a.open(item.id, index=i).name for i in range(h5py.h5a.get_num_attrs(item.id))]:
        return ""
    if is_refused(h5py.h5a.open(item.id, name.encode()).get_type()):
        return ""
    value = item.attrs[name]
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def whole_attribute(item: h5py.HLObject, name: str, most: int = 2**31 - 1) -> int:
    """The whole number 0 to `most` of an attribute.

    Raises:
        DataError: there is none, or it is something else.
    """
    value = item.attrs.get(name)
    if not isinstance(value, np.integer) or not 0 <= value <= most:
        raise DataError(
            f"{item.file.filename}: attribute {name} of {item.name} is {value!r}; expected a whole number up to {most}"
        )
    return int(value)


def write_text(group: h5py.Group, name: str, text: str) -> None:
    """A text of any length, as a uint8 dataset of its UTF-8 bytes."""
    dataset = group.create_dataset(name, data=np.frombuffer(text.encode(), dtype=np.uint8))
    set_text_attribute(dataset, "content", "UTF-8 text")


def read_text(group: h5py.Group, name: str) -> str:
    """The text that `write_text` stored.

    Raises:
        DataError: there is none of that name, or it is not UTF-8.
    """
    if name not in group:
        raise DataError(f"{group.file.filename}: {group.name} has no `{name}`")
    try:
        return bytes(np.asarray(group[name][...], dtype=np.uint8)).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{group.file.filename}: {group[name].name} is not UTF-8 text: {error}") from None


def write_ragged_text(group: h5py.Group, name: str, texts: list[str]) -> None:
    """Texts as `name` (uint8) and `name_offsets` (int64, one more than there are texts)."""
    raw = [text.encode() for text in texts]
    write_column(group, name, np.frombuffer(b"".join(raw), dtype=np.uint8))
    write_column(group, f"{name}_offsets", np.cumsum([0, *map(len, raw)], dtype=np.int64))


def read_ragged_text(group: h5py.Group, name: str) -> list[str]:
    """The texts that `write_ragged_text` stored."""
    raw = bytes(np.asarray(group[name][...], dtype=np.uint8))
    ends = read_offsets(group, f"{name}_offsets", len(raw))
    return [raw[a:b].decode(errors="replace") for a, b in pairwise(ends)]


# ---------------------------------------------------------------- columns


def write_column(group: h5py.Group, name: str, data: np.ndarray, *, units: str = "", text: str = "") -> h5py.Dataset:
    """One array as a compressed, chunked dataset with `units` and `long_name`; empty ones are stored plainly."""
    options = dict(COMPRESSION, chunks=(min(CHUNK, len(data)), *data.shape[1:])) if data.size else {}
    dataset = group.create_dataset(name, data=data, **options)
    for key, value in (("units", units), ("long_name", text)):
        if value:
            set_text_attribute(dataset, key, value)
    return dataset


def read_offsets(group: h5py.Group, name: str, total: int) -> np.ndarray:
    """Offsets of a ragged array: int64, from 0 to `total`, never falling.

    Raises:
        DataError: they are not.
    """
    offsets = np.asarray(group[name][...])
    fine = offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) > 0
    if not fine or offsets[0] != 0 or int(offsets[-1]) != total or np.any(offsets[1:] < offsets[:-1]):
        raise DataError(f"{group.file.filename}: {group[name].name} must rise from 0 to {total}")
    return offsets.astype(np.int64)


# ---------------------------------------------------------------- where a file comes from


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex.

    Raises:
        DataError: the file cannot be read.
    """
    refuse_irregular(path)
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def parse_json(text: str | bytes) -> Any:
    """What a JSON text of a stranger says.

    Raises:
        ValueError: it is none, or nested deeper than Python goes.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deep") from None


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """While a file is read more than once: it must be the same one, and not written to.

    Raises:
        DataError: it was replaced or written meanwhile.
    """
    refuse_irregular(path)
    before = _mark(path)
    yield
    if _mark(path) != before:
        raise DataError(f"{path}: was replaced or written while it was read; start again once it stays as it is")


def _mark(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def builds() -> dict[str, str]:
    """The program and the libraries that it runs on; takes no time to find out."""
    return {
        "moempi": moempi.__version__,
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "hdf5": h5py.version.hdf5_version,
        "machine": platform.machine(),
    }


def environment() -> dict[str, str]:
    """What a result may depend on besides the job: program, library builds and processor."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return builds() | {"torch": torch.__version__, "processor_capability": capability}
