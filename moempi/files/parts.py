"""Part files, and the growing columns that a merge appends them to.

While a job runs, what it makes lies in `<target>.parts/`: complete files, each written under a temporary name,
synced, renamed and never opened for writing again, so that a kill at any moment leaves every one of them readable.
A merge writes the target the same way and then removes the parts; interrupted anywhere it can be repeated.
"""

from __future__ import annotations

import glob
import logging
from pathlib import Path

import h5py
import numpy as np

from moempi.errors import DataError
from moempi.files.schema import CHUNK, COMPRESSION, set_text_attribute, sync

log = logging.getLogger(__name__)


def parts_folder(target: Path) -> Path:
    """The folder of a target's part files."""
    return target.with_name(target.name + ".parts")


def make_folder(folder: Path) -> None:
    """Create a folder, and those above it, unless they are there.

    Raises:
        DataError: with the cause.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be created as a folder: {error.strerror}") from error


def committed_parts(target: Path, pattern: str) -> list[Path]:
    """The part files of a target in the order of their names; temporary files are not among them."""
    return sorted(parts_folder(target).glob(pattern))


def remove_temporaries(target: Path) -> None:
    """Remove what a killed run was just writing, with a warning; only for whoever holds the target's lock."""
    beside = target.parent.glob(f".{glob.escape(target.name)}.*.tmp")
    for path in [*beside, *parts_folder(target).glob(".*.tmp")]:
        log.warning("%s: left half written by a run that was killed; removed", path)
        path.unlink(missing_ok=True)


def remove_parts(target: Path) -> None:
    """Remove a target's part files and their folder; only for whoever holds the target's lock.

    Raises:
        DataError: with the cause.
    """
    folder = parts_folder(target)
    try:
        for path in sorted(folder.glob("*")):
            path.unlink(missing_ok=True)
        if folder.is_dir():
            folder.rmdir()
            sync(folder.parent)
    except OSError as error:
        raise DataError(f"{folder}: cannot be removed: {error.strerror}") from error


class Column:
    """A compressed dataset that grows along its first axis."""

    def __init__(
        self, group: h5py.Group, name: str, dtype: str, *, width: int = 0, units: str = "", text: str = ""
    ) -> None:
        row = (width,) if width else ()
        self.dataset = group.create_dataset(
            name,
            shape=(0, *row),
            maxshape=(None, *row),
            chunks=(max(1, CHUNK // max(1, width)), *row),
            dtype=dtype,
            **COMPRESSION,
        )
        for key, value in (("units", units), ("long_name", text)):
            if value:
                set_text_attribute(self.dataset, key, value)

    def append(self, data: np.ndarray) -> None:
        """Append rows, which are converted to the column's type."""
        begin = len(self.dataset)
        if len(data):
            self.dataset.resize(begin + len(data), axis=0)
            self.dataset[begin:] = data


class Offsets:
    """The growing offsets of a ragged column: int64, one more than there are rows, starting with 0."""

    def __init__(self, group: h5py.Group, name: str, text: str) -> None:
        self._column = Column(group, name, "i8", text=text)
        self._column.append(np.zeros(1, dtype=np.int64))
        self._end = 0

    def append(self, lengths: np.ndarray) -> None:
        """Append rows by their lengths, int [n]."""
        ends = self._end + np.cumsum(lengths, dtype=np.int64)
        self._column.append(ends)
        self._end = int(ends[-1]) if len(ends) else self._end


class TextColumn:
    """Growing ragged text: `name` (uint8, UTF-8) and `name_offsets` (int64), as `schema.read_ragged_text` reads it."""

    def __init__(self, group: h5py.Group, name: str, text: str) -> None:
        self._bytes = Column(group, name, "u1", text=text)
        self._offsets = Offsets(group, f"{name}_offsets", f"where each text of {name} begins and ends")

    def append(self, texts: list[str]) -> None:
        """Append texts, in order."""
        raw = [text.encode(errors="replace") for text in texts]
        self._bytes.append(np.frombuffer(b"".join(raw), dtype=np.uint8))
        self._offsets.append(np.array([len(one) for one in raw], dtype=np.int64))
