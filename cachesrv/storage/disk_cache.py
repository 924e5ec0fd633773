"""A cache of objects on local disk, bounded in bytes: those that were used least recently make room for new ones.

The bytes in use are what the files have, those on their way included, for which room is reserved before the bytes come.
A ledger, a file that is only touched under its lock, holds their sum for all processes that share the folder.
A process that is killed leaves reservations in the ledger and temporary files; both go when all files are counted anew,
at the opening and whenever room is needed.

Files are kept as the object store keeps its own (`cachesrv.storage.filesystem`), whole or not at all. The modification
time of a file is when its object was last used.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from cachesrv.errors import StoreError, StoreFull
from cachesrv.storage.base import LocalFile, validate_key
from cachesrv.storage.incoming import IncomingFile, abandoned
from cachesrv.storage.threads import Threads, in_words, to_its_end
from cachesrv.storage.tree import Tree
from cachesrv.storage.warm import WarmFiles

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from typing import BinaryIO

P = ParamSpec("P")
T = TypeVar("T")

_LEDGER = ".ledger"
_LOW_WATER = 0.9
"""Evictions go on until so much of the limit is left in use: each of them looks at all files."""
_STEP = 16 * 2**20
"""Bytes by which room is reserved for an object whose size is not known."""
_TOUCH_SECONDS = 60
_MAX_TOUCHED = 10_000


class DiskCache:
    """See `cachesrv.storage.base.ObjectCache`. `path` is made when it is missing; `limit` bounds the bytes in use, and
    `spare` are those that are left to others on its disk. Raises StoreError.
    """

    def __init__(self, path: str | Path, *, limit: int, spare: int = 0, threads: int = 4) -> None:
        with in_words(f"open the disk cache {path}"):
            self._tree = Tree(Path(path))
            self._ledger = os.open(f"{self._tree.root}/{_LEDGER}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._limit = limit
        self._spare = spare
        self._warm = WarmFiles(self._tree.descriptor)
        self._threads = Threads(threads, name="disk-cache")
        # The lock on the ledger is between processes: within this one its holders share a descriptor.
        self._one_at_a_time = asyncio.Lock()
        self._touched: dict[str, float] = {}

    async def open(self) -> None:
        """Count what is there, clean up what a killed process left, and make room if the limit was lowered."""
        await self.exclusively(self._evict, 0)

    async def get(self, key: str) -> LocalFile | None:
        return await self.run(self._find, validate_key(key))

    def at_once(self, key: str, *, limit: int) -> memoryview | None:
        view = self._warm.read(validate_key(key), limit)
        if view is not None:
            self._touch(key)
        return view

    def warm_file(self, key: str, *, limit: int) -> tuple[int, int] | None:
        found = self._warm.open(validate_key(key), limit)
        if found is not None:
            self._touch(key)
        return found

    @asynccontextmanager
    async def incoming(self, key: str, size: int | None = None) -> AsyncIterator[Incoming]:
        incoming = Incoming(self, IncomingFile(self._tree, validate_key(key)), self._limit)
        try:
            await self.exclusively(incoming.file.create, None)
            await incoming.reserve(size or 0)
            yield incoming
        finally:
            await to_its_end(self._end(incoming))

    async def _end(self, incoming: Incoming) -> None:
        await incoming.unread()
        # What fails here is set right when all is counted anew.
        with suppress(StoreError):
            await self.exclusively(self._release, incoming)

    async def run(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Do something with a file in a thread of the cache's. Raises StoreError."""
        return await self._threads.run("use the disk cache", work, *args, **kwargs)

    async def exclusively(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The same, while nobody else counts files or touches the ledger."""
        async with self._one_at_a_time:
            return await self.run(self._locked, lambda: work(*args, **kwargs))

    async def discard(self, key: str) -> None:
        await self.exclusively(self._delete, validate_key(key))

    async def used(self) -> int:
        """Bytes in use."""
        return await self.exclusively(self._read)

    async def close(self) -> None:
        """Let go of files and threads."""
        if not self._threads.closed:
            await self._threads.close()
            self._warm.close()
            os.close(self._ledger)
            self._tree.close()

    # What follows blocks, and runs in threads.

    def _find(self, key: str) -> LocalFile | None:
        found = self._tree.stat(key)
        if found is None:
            return None
        self._touch(key)
        return LocalFile(f"{self._tree.root}/{key}", found.st_size)

    def _touch(self, key: str) -> None:
        now = time.monotonic()
        if now - self._touched.get(key, -_TOUCH_SECONDS) < _TOUCH_SECONDS:
            return
        if len(self._touched) >= _MAX_TOUCHED:
            self._touched.clear()
        self._touched[key] = now
        # It may have gone; and where times cannot be set, the order of leaving is that of coming.
        with suppress(OSError):
            os.utime(f"{self._tree.root}/{key}", follow_symlinks=False)

    def _locked(self, work: Callable[[], T]) -> T:
        with _lock(self._ledger):
            return work()

    # What follows holds the lock.

    def reserve(self, incoming: Incoming, size: int) -> None:
        """Make room for an object on its way to have `size` bytes. Its file takes them at once, so that whoever counts
        the files counts that too. Raises StoreFull.
        """
        more = size - incoming.reserved
        if self._read() + more > self._most(self._read()):
            self._evict(more)
        # First in the ledger: whoever is killed in between has taken too much, and not too little.
        self._add(more)
        try:
            incoming.file.reserve(size)
        except BaseException:
            self._add(-more)
            raise
        incoming.reserved = size

    def settle(self, incoming: Incoming) -> None:
        """Give back what it does not need after all."""
        incoming.file.truncate(incoming.written)
        self._add(incoming.written - incoming.reserved)
        incoming.reserved = incoming.written

    def reveal(self, incoming: Incoming) -> None:
        """Make it an object, unless it is one already."""
        incoming.committed = incoming.file.reveal(replace=False)

    def _release(self, incoming: Incoming) -> None:
        incoming.file.discard()
        if not incoming.committed:
            self._add(-incoming.reserved)

    def _delete(self, key: str) -> None:
        found = self._tree.stat(key)
        if found is not None:
            self._tree.remove([key])
            self._add(-found.st_size)

    def _evict(self, size: int) -> None:
        """Count everything; if `size` more bytes do not fit, let go of what was used longest ago. Raises StoreFull if
        that is not enough. Nobody who wants no room is kept out by what others have under way.
        """
        for _ in abandoned(self._tree, older_than=0, remove=True):
            pass
        files, on_their_way = self._count()
        used = sum(length for _, length, _ in files) + on_their_way
        most = self._most(used)
        if size and on_their_way + size > most:
            self._write(used)
            raise StoreFull("the disk cache is full of objects on their way, or its disk is of other things")
        if used + size > most:
            doomed: list[str] = []
            for _, length, key in sorted(files):
                if used + size <= most * _LOW_WATER:
                    break
                doomed.append(key)
                used -= length
            self._tree.remove(doomed)
        self._write(used)

    def _most(self, used: int) -> int:
        """Bytes that may be in use."""
        return min(self._limit, max(0, used + self._tree.free() - self._spare))

    def _count(self) -> tuple[list[tuple[float, int, str]], int]:
        """Of each object when it was used, its size and its key; and the bytes of files that are no objects yet."""
        files: list[tuple[float, int, str]] = []
        on_their_way = 0
        for found in self._tree.walk(""):
            name = found.entry.name
            if name == _LEDGER or not found.entry.is_file(follow_symlinks=False):
                continue
            try:
                about = found.entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if name.startswith("."):
                on_their_way += about.st_size
            else:
                files.append((about.st_mtime, about.st_size, found.key))
        return files, on_their_way

    def _add(self, change: int) -> None:
        self._write(max(0, self._read() + change))

    def _read(self) -> int:
        return int.from_bytes(os.pread(self._ledger, 8, 0), "little")

    def _write(self, used: int) -> None:
        os.pwrite(self._ledger, used.to_bytes(8, "little"), 0)


class Incoming:
    """See `cachesrv.storage.base.IncomingObject`. `reserved`: bytes that the ledger holds for it."""

    def __init__(self, cache: DiskCache, file: IncomingFile, limit: int) -> None:
        self.file = file
        self.reserved = 0
        self.written = 0
        self.committed = False
        self._cache = cache
        self._limit = limit
        self._readers = 0
        self._unread = asyncio.Event()
        self._ended = False

    async def reserve(self, size: int) -> None:
        """Have room for `size` bytes in all. Raises StoreFull."""
        if size > self._limit:
            raise StoreFull(f"an object of {size} bytes is larger than the disk cache, which holds {self._limit}")
        if size > self.reserved:
            await self._cache.exclusively(self._cache.reserve, self, size)

    async def write(self, data: bytes) -> None:
        needed = self.written + len(data)
        if needed > self.reserved:
            await self.reserve(max(needed, min(self.reserved + _STEP, self._limit)))
        await self._cache.run(self.file.write, data)
        self.written = needed

    async def read(self, position: int, length: int) -> bytes:
        if self._ended:
            raise StoreError("the object is no longer on its way")
        self._readers += 1
        try:
            return await self._cache.run(self.file.read, position, min(length, max(0, self.written - position)))
        finally:
            self._readers -= 1
            if not self._readers:
                self._unread.set()

    def reopened(self) -> BinaryIO:
        if self._ended:
            raise StoreError("the object is no longer on its way")
        with in_words("use the disk cache"):
            return self.file.reopened()

    async def unread(self) -> None:
        """Let nobody begin to read, and wait for those who do: the file is closed next, and its number given away."""
        self._ended = True
        if self._readers:
            self._unread.clear()
            await self._unread.wait()

    async def commit(self) -> None:
        cache = self._cache
        await cache.exclusively(cache.settle, self)
        await cache.run(self.file.sync)
        await cache.exclusively(cache.reveal, self)
        await cache.run(self.file.sync_folder)


@contextmanager
def _lock(ledger: int) -> Iterator[None]:
    fcntl.flock(ledger, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(ledger, fcntl.LOCK_UN)
