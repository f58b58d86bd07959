"""How far a stream has come, without asking CUDA.

A stream writes a number into pinned memory of the host when it comes past a mark; reading that costs the host 50 ns,
where an event costs some microseconds to make, record and ask. Marks of a stream pass in their order.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from moempi.errors import MoempiError


class Clock:
    """What is to happen when a stream has come past its marks.

    Args:
        stream: whose work the marks lie behind.
    """

    def __init__(self, stream: torch.cuda.Stream):
        self._stream = stream.cuda_stream
        self._word = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        self._address, self._passed = self._word.data_ptr(), self._word.numpy().data
        self._marks = 0
        self._waiting: deque[tuple[int, Callable[[], Any]]] = deque()
        self._write = _stream_write()

    def __bool__(self) -> bool:
        """Whether anything waits."""
        return bool(self._waiting)

    def after(self, callback: Callable[[], Any]) -> None:
        """Call back, out of `look`, once all that has been launched on the stream until now has ended."""
        self._marks += 1
        code = self._write(self._stream, self._address, self._marks, 0)
        if code:
            raise MoempiError(f"the GPU's driver does not let a stream write to the host (error {code})")
        self._waiting.append((self._marks, callback))

    def look(self) -> bool:
        """Do what the stream has come past; whether there was anything."""
        waiting, passed = self._waiting, self._passed[0]
        if not waiting or waiting[0][0] > passed:
            return False
        while waiting and waiting[0][0] <= passed:
            waiting.popleft()[1]()
        return True


@cache
def _stream_write() -> Callable[[int, int, int, int], int]:
    """cuStreamWriteValue64(stream, address, value, flags): behind the stream's work, and behind what that wrote."""
    library = ctypes.CDLL("libcuda.so.1")
    write = getattr(library, "cuStreamWriteValue64_v2", None) or library.cuStreamWriteValue64
    write.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint]
    write.restype = ctypes.c_int
    return write
