"""Having many new files on disk by one call instead of one each.

syncfs(2) writes all that a file system has in memory. For a hundred new files that is about the work of one fsync(2),
but it waits for what others have written there as well, and not everywhere is it a promise. So it is used where it
tells of errors (Linux 5.8), on file systems whose sync_fs is as good as an fsync, and while little else is waiting to
be written on this machine; in all other cases each file is to be synced by itself.

Of an error it tells once for each description of an open file, and only if that was opened before: who asks by one that
others ask by too may never hear that what they wrote was lost. So each asks by a file of its own.
"""

from __future__ import annotations

import ctypes
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LEAST_FILES = 8
"""Fewer are not worth the look at what else is waiting."""

MOST_WAITING = 64 * 1024 * 1024
"""Bytes that may wait to be written on the whole machine."""

TRUSTED = {
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0xF2F52010: "f2fs",
    0x01021994: "tmpfs",
}
"""Types of file systems (linux/magic.h) where syncfs is as good as fsync."""

_TELLS_OF_ERRORS = (5, 8)
_WAITING = re.compile(rb"^(?:Dirty|Writeback): +(\d+) kB$", re.MULTILINE)
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_STATFS_SIZE = 256  # more than any struct statfs; its first field is the type, a long


def sync_together(files: Sequence[int]) -> bool:
    """Have files on disk, if this is a good way for so many; whether it was. Their descriptors are in the order in
    which they were opened, each before anything was written to it or to those after it. Raises OSError.
    """
    if _release() < _TELLS_OF_ERRORS or len(files) < LEAST_FILES or waiting() > MOST_WAITING:
        return False
    first: dict[int, int] = {}
    for descriptor in files:
        first.setdefault(os.fstat(descriptor).st_dev, descriptor)
    if not all(_type_of(descriptor) in TRUSTED for descriptor in first.values()):
        return False
    for descriptor in first.values():
        syncfs(descriptor)
    return True


def syncfs(descriptor: int) -> None:
    """Have all on disk that was written to the file system of this descriptor. Raises OSError."""
    if _libc.syncfs(descriptor):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def begin_writing(descriptor: int, start: int, size: int) -> None:
    """Have the disk begin with these bytes of a file, so that there is little left to wait for when it is synced. Of no
    consequence where it does not work: what goes wrong is told by fsync(2).
    """
    _libc.sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)


def waiting() -> int:
    """Bytes that this machine has in memory and not yet on its disks; as good as endless where nobody can tell."""
    try:
        with open("/proc/meminfo", "rb") as file:  # noqa: PTH123  asked often
            found = _WAITING.findall(file.read())
    except OSError:
        return 2**63
    return sum(map(int, found)) * 1024 if found else 2**63


def _release() -> tuple[int, ...]:
    """Of the kernel: major and minor number."""
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return tuple(map(int, match.groups())) if match else ()


def _type_of(descriptor: int) -> int:
    """Of a file system, 0 where that cannot be told."""
    found = ctypes.create_string_buffer(_STATFS_SIZE)
    if _libc.fstatfs(descriptor, found):
        return 0
    return ctypes.c_long.from_buffer(found).value & 0xFFFFFFFF


_libc = ctypes.CDLL(None, use_errno=True)
