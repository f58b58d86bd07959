"""What is refused in an HDF5 file before any of it is read: ways out of the file, and sizes that its bytes cannot hold.

A file may come from a stranger. Its objects must form a plain tree of groups and datasets of numbers, kept in the
file itself, and what a dataset claims to hold must be there: a dataset of 2^50 numbers takes no disk where they are
all a fill value, and reading it would allocate all of them.
"""

from __future__ import annotations

import math
from pathlib import Path

import h5py

from moempi.errors import DataError

# Deflate makes at most 1032 bytes of one (RFC 1951: 258 bytes take two bits).
LARGEST_RATIO = 1032
# The library decompresses whole chunks; those of growing columns are as large before there is a row.
SMALL_CHUNK = 2**20
LARGEST_ATTRIBUTE = 2**16  # bytes; also the limit of the format's plain attributes
DEEPEST = 16  # groups in groups; the deepest file of the program has four
_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}


def check_safe(file: h5py.File, path: Path) -> None:
    """Refuse links, data outside the file, variable-length types, and sizes that the file is too small for.

    Raises:
        DataError: naming the object.
    """
    _Walk(path, file.id.get_filesize()).group(file, 0)


class _Walk:
    """One walk through a file: which objects were seen, and how many bytes they say that they take."""

    def __init__(self, path: Path, file_bytes: int) -> None:
        self._path, self._file_bytes = path, file_bytes
        self._seen: set[int] = set()
        self._stored = 0

    def group(self, group: h5py.Group, depth: int) -> None:
        """Look at a group and all below it."""
        self._once(group)
        check_attributes(group, self._path)
        if depth > DEEPEST:
            raise DataError(f"{self._path}: {group.name} lies in more than {DEEPEST} groups")
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise DataError(f"{self._path}: {group.name}/{name} is a link; links are not followed")
            item = group[name]
            if isinstance(item, h5py.Group):
                self.group(item, depth + 1)
            elif isinstance(item, h5py.Dataset):
                self._dataset(item)
            else:
                raise DataError(f"{self._path}: {group.name}/{name} is neither a group nor a dataset")

    def _once(self, item: h5py.HLObject) -> None:
        # A group that holds itself has no end.
        address = h5py.h5o.get_info(item.id).addr
        if address in self._seen:
            raise DataError(f"{self._path}: {item.name} is the same object as another; expected one name for each")
        self._seen.add(address)

    def _dataset(self, item: h5py.Dataset) -> None:
        self._once(item)
        if kind := why_refused(item.id.get_type()):
            raise DataError(f"{self._path}: {item.name} has {kind}, which is refused")
        if item.external or item.is_virtual:
            raise DataError(f"{self._path}: {item.name} keeps its data in another file, which is refused")
        check_attributes(item, self._path)
        self._stored += check_claims(item, self._path)
        if self._stored > self._file_bytes:
            raise DataError(
                f"{self._path}: {item.name} and those before it take {self._stored} bytes, as the file says; "
                f"the file has {self._file_bytes}"
            )


def check_claims(item: h5py.Dataset, path: Path) -> int:
    """Refuse a dataset whose claimed size its stored bytes cannot hold; returns the stored bytes.

    Raises:
        DataError: naming the dataset and both sizes.
    """
    kept = item.id.get_create_plist()
    itemsize, stored = item.id.get_type().get_size(), item.id.get_storage_size()
    claimed = math.prod(item.id.shape or ()) * itemsize
    most = stored
    if kept.get_layout() == h5py.h5d.CHUNKED:
        chunk = math.prod(kept.get_chunk()) * itemsize
        if chunk > max(claimed, SMALL_CHUNK):
            raise DataError(f"{path}: {item.name} has chunks of {chunk} bytes for {claimed} bytes of data")
        if _compresses(item, kept, path):
            most = stored * LARGEST_RATIO
    if item.id.shape is None or claimed > most:
        raise DataError(
            f"{path}: {item.name} claims {claimed} bytes, but stores {stored}; it is damaged, or was never filled"
        )
    return int(stored)


def _compresses(item: h5py.Dataset, kept: h5py.h5p.PropDCID, path: Path) -> bool:
    filters = [kept.get_filter(index)[0] for index in range(kept.get_nfilters())]
    if len(set(filters)) < len(filters) or not _FILTERS.issuperset(filters):
        raise DataError(f"{path}: {item.name} has the filters {filters}; expected gzip, shuffle, checksum, each once")
    return h5py.h5z.FILTER_DEFLATE in filters


def check_attributes(item: h5py.HLObject, path: Path) -> None:
    """Refuse attributes of variable-length types, and large ones."""
    for index in range(h5py.h5a.get_num_attrs(item.id)):
        attribute = h5py.h5a.open(item.id, index=index)
        name = attribute.name.decode(errors="replace")
        if kind := why_refused(attribute.get_type()):
            raise DataError(f"{path}: attribute {name} of {item.name} has {kind}")
        if attribute.get_storage_size() > LARGEST_ATTRIBUTE:
            raise DataError(f"{path}: attribute {name} of {item.name} takes more than {LARGEST_ATTRIBUTE} bytes")


def is_refused(kind: h5py.h5t.TypeID) -> bool:
    """Whether a type may not be read."""
    return bool(why_refused(kind))


def why_refused(kind: h5py.h5t.TypeID) -> str:
    """What a type is that may not be read; empty for a number, or a text of fixed length in a known encoding."""
    if isinstance(kind, h5py.h5t.TypeStringID):
        if kind.is_variable_str():
            return "a variable-length type"
        known = kind.get_cset() in (h5py.h5t.CSET_ASCII, h5py.h5t.CSET_UTF8)
        return "" if known else "text in an unknown encoding"
    if kind.get_class() in (h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.ENUM):
        return ""
    is_variable = kind.get_class() == h5py.h5t.VLEN
    return "a variable-length type" if is_variable else "a type that is neither a number nor a text"
