"""Reading files that the kernel has in memory, and only those: what cannot block may run in the event loop.

Two calls of Linux make that sure. `openat2` with RESOLVE_CACHED (5.12) opens a path only when all of it is in the
cache of names, and with RESOLVE_NO_SYMLINKS and RESOLVE_BENEATH follows no link and does not leave the root.
`preadv2` with RWF_NOWAIT (4.14) reads only what is in the page cache. Where they are missing, nothing is warm.
Sources: openat2(2), preadv2(2).
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from contextlib import suppress

_SYS_OPENAT2 = 437
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_RESOLVE_CACHED = 0x20
_HOW = struct.pack(
    "=QQQ",
    os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK,
    0,
    _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH | _RESOLVE_CACHED,
)


class WarmFiles:
    """Files below the folder that `root` is a descriptor of; it stays the caller's to close."""

    def __init__(self, root: int) -> None:
        self._root = ctypes.c_long(root)
        self._how = ctypes.create_string_buffer(_HOW, len(_HOW))
        self._how_size = ctypes.c_size_t(len(_HOW))
        self._number = ctypes.c_long(_SYS_OPENAT2)
        # Without letting go of the interpreter's lock: the call does not wait for anything.
        self._syscall = ctypes.PyDLL(None).syscall
        self._syscall.restype = ctypes.c_long
        self._buffer = bytearray()

    def read(self, path: str, limit: int) -> memoryview | None:
        """A whole file of at most `limit` bytes, valid until the next call; None when it is not to be had at once."""
        descriptor = self._syscall(self._number, self._root, path.encode(), self._how, self._how_size)
        if descriptor < 0:
            return None
        try:
            found = os.fstat(descriptor)
            size = found.st_size
            if size > limit or not stat.S_ISREG(found.st_mode):
                return None
            if size > len(self._buffer):
                self._buffer = bytearray(size)
            view = memoryview(self._buffer)[:size]
            with suppress(OSError):
                if os.preadv(descriptor, [view], 0, os.RWF_NOWAIT) == size:
                    return view
            return None
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Nothing is warm from now on: the number of the root's descriptor may soon be that of something else."""
        self._root.value = -1
