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
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from cachesrv.errors import StoreFull
from cachesrv.storage.base import LocalFile, validate_key
from cachesrv.storage.incoming import IncomingFile, sweep
from cachesrv.storage.threads import Threads, in_words
from cachesrv.storage.tree import Tree
from cachesrv.storage.warm import WarmFiles

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

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
    """`path` is made when it is missing; `limit` bounds the bytes in use. Raises StoreError."""

    def __init__(self, path: str | Path, *, limit: int, threads: int = 4) -> None:
        with in_words("open the disk cache"):
            self._tree = Tree(Path(path))
            self._ledger = os.open(f"{self._tree.root}/{_LEDGER}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._limit = limit
        self._warm = WarmFiles(self._tree.descriptor)
        self._threads = Threads(threads, name="disk-cache")
        # The lock on the ledger is between processes: within this one its holders share a descriptor.
        self._one_at_a_time = asyncio.Lock()
        self._touched: dict[str, float] = {}

    async def open(self) -> None:
        """Count what is there, clean up what a killed process left, and make room if the limit was lowered."""
        async with self._one_at_a_time:
            await self._threads.run("open the disk cache", self._make_room, 0)

    async def get(self, key: str) -> LocalFile | None:
        """Where the object lies, None when it is not here. Evicted files stay readable for those who have them open."""
        return await self._threads.run("look into the disk cache", self._find, validate_key(key))

    def at_once(self, key: str, *, limit: int) -> memoryview | None:
        """As `ObjectStore.at_once`."""
        view = self._warm.read(validate_key(key), limit)
        if view is not None:
            self._touch(key)
        return view

    @asynccontextmanager
    async def incoming(self, key: str, size: int | None = None) -> AsyncIterator[Incoming]:
        file = IncomingFile(self._tree, validate_key(key))
        incoming = Incoming(self, file)
        try:
            await self.run(file.create, None)
            await self.reserve(incoming, size if size is not None else _STEP)
            yield incoming
        finally:
            await self.run(self._end, incoming)

    async def reserve(self, incoming: Incoming, size: int) -> None:
        """Make room for `size` bytes more of an object on its way. Raises StoreFull."""
        if incoming.reserved + size > self._limit:
            raise StoreFull("an object is larger than the disk cache")
        async with self._one_at_a_time:
            await self.run(self._reserve, incoming, incoming.reserved + size)

    async def run(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Do something with a file in a thread of the cache's."""
        return await self._threads.run("use the disk cache", work, *args, **kwargs)

    async def discard(self, key: str) -> None:
        """Forget an object."""
        await self._threads.run("delete from the disk cache", self._delete, validate_key(key))

    async def used(self) -> int:
        """Bytes in use."""
        return await self._threads.run("look into the disk cache", self._used)

    async def close(self) -> None:
        """Let go of files and threads."""
        if not self._threads.closed:
            await self._threads.close()
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
        try:
            os.utime(f"{self._tree.root}/{key}", follow_symlinks=False)
        except FileNotFoundError:
            return

    def _reserve(self, incoming: Incoming, total: int) -> None:
        """The file takes what is reserved for it at once, so that whoever counts the files counts that too."""
        more = total - incoming.reserved
        with self._locked():
            if self._read() + more > self._limit:
                self._evict(more)
            if total:
                incoming.file.reserve(total)
            self._write(self._read() + more)
        incoming.reserved = total

    def _end(self, incoming: Incoming) -> None:
        """What was reserved and is not taken by a file is free again."""
        with self._locked():
            incoming.file.discard()
            self._write(max(0, self._read() - incoming.reserved + (incoming.written if incoming.committed else 0)))

    def _delete(self, key: str) -> None:
        with self._locked():
            found = self._tree.stat(key)
            if found is not None:
                self._tree.remove([key])
                self._write(max(0, self._read() - found.st_size))

    def _used(self) -> int:
        with self._locked():
            return self._read()

    def _make_room(self, size: int) -> None:
        with self._locked():
            self._evict(size)

    def _evict(self, size: int) -> None:
        """Count everything; if `size` more bytes do not fit, let go of what was used longest ago."""
        for _ in sweep(self._tree, older_than=0):
            pass
        used = 0
        files: list[tuple[float, int, str]] = []
        for found in self._tree.walk(""):
            if found.entry.name == _LEDGER or not found.entry.is_file(follow_symlinks=False):
                continue
            about = found.entry.stat(follow_symlinks=False)
            used += about.st_size
            if not found.entry.name.startswith("."):
                files.append((about.st_mtime, about.st_size, found.key))
        if used + size > self._limit:
            doomed: list[str] = []
            for _, length, key in sorted(files):
                if used + size <= self._limit * _LOW_WATER:
                    break
                doomed.append(key)
                used -= length
            self._tree.remove(doomed)
        self._write(used)
        if used + size > self._limit:
            raise StoreFull("the disk cache is full of objects on their way")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._ledger, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._ledger, fcntl.LOCK_UN)

    def _read(self) -> int:
        return int.from_bytes(os.pread(self._ledger, 8, 0), "little")

    def _write(self, used: int) -> None:
        os.pwrite(self._ledger, used.to_bytes(8, "little"), 0)


class Incoming:
    """An object on its way into the cache, that can be read as far as it has come. Sizes are in bytes."""

    def __init__(self, cache: DiskCache, file: IncomingFile) -> None:
        self._cache = cache
        self.file = file
        self.reserved = 0
        self.written = 0
        self.committed = False

    async def write(self, data: bytes) -> None:
        """Append. Raises StoreFull, StoreError."""
        if self.written + len(data) > self.reserved:
            await self._cache.reserve(self, max(_STEP, len(data)))
        await self._cache.run(self.file.write, data)
        self.written += len(data)

    async def read(self, position: int, length: int) -> bytes:
        """Bytes that were written, fewer than `length` where no more were."""
        return await self._cache.run(self.file.read, position, length)

    async def commit(self) -> None:
        """Make it visible; if it is there already, that one stays."""
        await self._cache.run(self.file.truncate, self.written)
        self.committed = await self._cache.run(self.file.finish, b"", replace=False)
