"""Reading files that the kernel has in memory, and only those: what cannot block may run in the event loop.

Calls of Linux make that sure. `openat2` with RESOLVE_CACHED (5.12) opens a path only when all of it is in the cache of
names, and with RESOLVE_NO_SYMLINKS and RESOLVE_BENEATH follows no link and does not leave the root. `preadv2` with
RWF_NOWAIT (4.14) reads only what is in the page cache, and `cachestat` (6.5) says how much of a file is there. Where
they are missing, nothing is warm. Sources: openat2(2), preadv2(2), mm/filemap.c of Linux.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from contextlib import suppress

_SYS_OPENAT2 = 437
_SYS_CACHESTAT = 451
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_RESOLVE_CACHED = 0x20
_HOW = struct.pack(
    "=QQQ",
    os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK,
    0,
    _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH | _RESOLVE_CACHED,
)
_WHOLE_FILE = bytes(16)
_CACHED_PAGES = struct.Struct("=Q32x")
_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")


class WarmFiles:
    """Files below the folder that `root` is a descriptor of; it stays the caller's to close."""

    def __init__(self, root: int) -> None:
        self._root = ctypes.c_long(root)
        self._how = ctypes.create_string_buffer(_HOW, len(_HOW))
        self._how_size = ctypes.c_size_t(len(_HOW))
        self._openat2 = ctypes.c_long(_SYS_OPENAT2)
        self._cachestat = ctypes.c_long(_SYS_CACHESTAT)
        self._range = ctypes.create_string_buffer(_WHOLE_FILE, len(_WHOLE_FILE))
        self._cached = ctypes.create_string_buffer(_CACHED_PAGES.size)
        # Without letting go of the interpreter's lock: the calls do not wait for anything.
        self._syscall = ctypes.PyDLL(None).syscall
        self._syscall.restype = ctypes.c_long
        self._buffer = bytearray()

    def open(self, path: str, limit: int) -> tuple[int, int] | None:
        """A descriptor of a file of at most `limit` bytes, for the caller to close, and its size; None when not all of
        the file is to be had at once.
        """
        found = self._open(path, limit)
        if found is None or self._all_cached(*found):
            return found
        os.close(found[0])
        return None

    def read(self, path: str, limit: int) -> memoryview | None:
        """A whole file of at most `limit` bytes, valid until the next call; None when it is not to be had at once."""
        found = self._open(path, limit)
        if found is None:
            return None
        descriptor, size = found
        try:
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

    def _open(self, path: str, limit: int) -> tuple[int, int] | None:
        descriptor: int = self._syscall(self._openat2, self._root, path.encode(), self._how, self._how_size)
        if descriptor < 0:
            return None
        found = os.fstat(descriptor)
        if found.st_size <= limit and stat.S_ISREG(found.st_mode):
            return descriptor, found.st_size
        os.close(descriptor)
        return None

    def _all_cached(self, descriptor: int, size: int) -> bool:
        if self._syscall(self._cachestat, descriptor, self._range, self._cached, 0) != 0:
            return False
        pages: int = _CACHED_PAGES.unpack(self._cached)[0]
        return pages * _PAGE_SIZE >= size
