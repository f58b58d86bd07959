"""The file under a new HDF5 file: it keeps a failed write to itself until HDF5 has closed the file.

The HDF5 library does not survive a full disk: when its own write fails while a file is being closed, objects stay
half open and the process can crash later, at exit. Here every write is answered as if it had gone well, the first
error is remembered, and `schema.create` raises it once the library is done with the file.
"""

from __future__ import annotations

import io
import os
from pathlib import Path


class Sink:
    """A new file for h5py.File(sink, "w"); `error` is the first thing that went wrong, if any.

    Raises:
        OSError: on creation, when the file cannot be created at all. Never afterwards.
    """

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._position = 0
        self._size = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position, as of any file."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """The position in bytes."""
        return self._position

    def read(self, size: int = -1) -> bytes:
        """h5py takes an object for a file by this method, and reads with `readinto`."""
        raise io.UnsupportedOperation("read")

    def readinto(self, buffer: memoryview) -> int:
        """Read at the position; what could not be written reads as zeros."""
        view = memoryview(buffer).cast("B")
        try:
            found = os.preadv(self._handle, [view], self._position)
        except OSError as error:
            self._keep(error)
            found = 0
        view[found:] = bytes(len(view) - found)
        self._position += len(view)
        return len(view)

    def write(self, data: memoryview) -> int:
        """Write all of `data` at the position, or remember why that failed."""
        view = memoryview(data).cast("B")
        written = 0
        try:
            while written < len(view) and self.error is None:
                written += os.pwrite(self._handle, view[written:], self._position + written)
        except OSError as error:
            self._keep(error)
        self._position += len(view)
        self._size = max(self._size, self._position)
        return len(view)

    def truncate(self, size: int) -> int:
        """Set the size in bytes."""
        try:
            os.ftruncate(self._handle, size)
        except OSError as error:
            self._keep(error)
        self._size = size
        return size

    def flush(self) -> None:
        """Nothing is held back here; `close` is what waits for the disk."""

    def close(self) -> None:
        """Wait until the bytes are on the disk and close the file; call it after HDF5 has closed its side."""
        try:
            os.fsync(self._handle)
        except OSError as error:
            self._keep(error)
        os.close(self._handle)

    def _keep(self, error: OSError) -> None:
        self.error = self.error or error
