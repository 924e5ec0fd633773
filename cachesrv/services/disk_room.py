"""Room on the disks of this host: what pushes have to leave, and a file that is given up when nothing else is left.

To take garbage away needs room before it gives any: the catalog writes a log, the index copies its pages. So on each
disk that we write to lies a file without contents, its *reserve*, that is made empty before a collection when the disk
is full, and filled again after it. Pushes leave as much again to catalog and index, and never take what a reserve is to
have: they are refused before that, with how much is missing. Other programs know nothing of it, and may fill the disk
to its last byte; what is there can be read all the same.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import structlog

from cachesrv.errors import StoreFull

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator
    from pathlib import Path

_log = structlog.get_logger()

RESERVE = ".cachesrv-reserve"
"""Its name in folders of others; names that begin with a dot are no objects."""

_SLACK = 2**20
"""Bytes that a reserve leaves: small files are made whenever stores are opened."""

_KEPT_EVERY = 10.0
"""Seconds."""
_MODE = 0o600
_BLOCK = 512
"""Bytes that `st_blocks` counts in (stat(2))."""


@dataclass(frozen=True, slots=True)
class Place:
    """A folder that is written to, and the file that would be the reserve of its disk; `has_objects`: NARs go there."""

    folder: Path
    reserve: Path
    has_objects: bool = False


class DiskRoom:
    """`size`: bytes of each reserve, and that pushes leave beside it; 0 for none. Of several places on one disk the
    first has the reserve.
    """

    def __init__(self, places: Iterable[Place], *, size: int) -> None:
        self._size = size
        self._disks: dict[int, Place] = {}
        for place in places:
            device = _existing(place.folder).stat().st_dev
            first = self._disks.setdefault(device, place)
            if place.has_objects:
                self._disks[device] = Place(first.folder, first.reserve, has_objects=True)

    @classmethod
    def unlimited(cls) -> Self:
        """Nothing is looked at."""
        return cls((), size=0)

    async def for_nar(self, size: int = 0) -> None:
        """Raises StoreFull unless so many more bytes may be written."""
        await asyncio.to_thread(self._demand, size, self._size)

    async def for_records(self) -> None:
        """Raises StoreFull when there is hardly room for small objects, and for what catalog and index say of them.
        There is some when there is none for NARs any more: what has been taken in can be published.
        """
        await asyncio.to_thread(self._demand, 0, self._size // 2)

    def _demand(self, size: int, margin: int) -> None:
        for disk in self._disks.values():
            needed = margin + (size if disk.has_objects else 0)
            free = self._free(disk)
            if free < needed:
                raise StoreFull(
                    f"no room on the disk of {disk.folder}: {needed - free} more bytes are needed",
                    missing=needed - free,
                )

    def _free(self, disk: Place) -> int:
        """Bytes that are left beside what its reserve has or is to have."""
        return _free(disk.folder) - max(0, self._size - _allocated(disk.reserve))

    def keep(self) -> None:
        """Make the reserves that are not there, where there is room, unless they are given up just now. Blocks."""
        for disk in self._disks.values():
            try:
                self._keep(disk)
            except BlockingIOError:
                continue
            except OSError as error:
                _log.warning("there can be no reserve", file=str(disk.reserve), error=str(error))

    def _keep(self, disk: Place) -> None:
        there = _allocated(disk.reserve)
        if not self._size:
            disk.reserve.unlink(missing_ok=True)
        elif there > self._size + _SLACK:
            with _locked(disk.reserve) as descriptor:
                os.ftruncate(descriptor, self._size)
        elif there < self._size <= there + _free(disk.folder) - _SLACK:
            with _locked(disk.reserve) as descriptor:
                os.posix_fallocate(descriptor, 0, self._size)

    @asynccontextmanager
    async def kept(self, *, every: float = _KEPT_EVERY) -> AsyncIterator[None]:
        """Meanwhile reserves are made again when there is room: that of deleted files which somebody still reads comes
        back some time after their collection.
        """
        keeping = asyncio.create_task(self._keep_on(every))
        try:
            yield
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])

    async def _keep_on(self, every: float) -> None:
        while True:
            await asyncio.sleep(every)
            await asyncio.to_thread(self.keep)

    @contextmanager
    def given_up_if_full(self) -> Iterator[None]:
        """Meanwhile full disks are without their reserves, unless another process has given them up. Blocks."""
        try:
            with ExitStack() as locks:
                for disk in self._disks.values():
                    if self._free(disk) < self._size and disk.reserve.exists():
                        with suppress(BlockingIOError):
                            os.ftruncate(locks.enter_context(_locked(disk.reserve)), 0)
                            _log.warning("the disk is full, its reserve is used", folder=str(disk.folder))
                yield
        finally:
            self.keep()


@contextmanager
def _locked(file: Path) -> Iterator[int]:
    """A descriptor of the file, which is made; nobody else has it. Raises BlockingIOError, OSError."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, _MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)


def _existing(folder: Path) -> Path:
    """The folder, or that in which it will be made."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _free(folder: Path) -> int:
    room = os.statvfs(_existing(folder))
    return room.f_bavail * room.f_frsize


def _allocated(file: Path) -> int:
    with suppress(FileNotFoundError):
        return file.stat().st_blocks * _BLOCK
    return 0
