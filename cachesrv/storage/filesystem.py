"""Objects as files below one folder, which is a binary cache for any Nix client (`file://…`) as it lies there.

Several processes may share the folder. Names that begin with a dot are no objects: they are files on their way
(`cachesrv.storage.incoming`) or of no concern. No symbolic link below the root is followed (`cachesrv.storage.tree`).
Folders are made as they are needed and never removed. The file system has to know hard links.
"""

from __future__ import annotations

import asyncio
import os
import stat
from contextlib import ExitStack, asynccontextmanager, closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cachesrv.errors import BadInput, Mismatch, NotFound, StoreError, TooLarge
from cachesrv.storage import incoming
from cachesrv.storage.base import MAX_KEY_LENGTH, LocalFile, ObjectInfo, is_segment, validate_key, validate_prefix
from cachesrv.storage.incoming import IncomingFile, Together, sync
from cachesrv.storage.syncing import sync_together
from cachesrv.storage.threads import Threads, in_words, to_its_end
from cachesrv.storage.tree import Tree, split
from cachesrv.storage.warm import WarmFiles

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Generator, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from cachesrv.storage.base import ByteRange, ObjectWriter

T = TypeVar("T")
Incoming = TypeVar("Incoming", IncomingFile, Together)

_WRITTEN_TOGETHER = 2**20
_READ_TOGETHER = 2**19
_WALKED_TOGETHER = 500
_PUT_TOGETHER = 256
_PUT_THREADS = 4


class FilesystemStore:
    """See `cachesrv.storage.base.ObjectStore`. `root` is made when it is missing; at most `threads` calls work at the
    same time, others wait. Raises StoreError.
    """

    def __init__(self, root: str | Path, *, threads: int = 8) -> None:
        with in_words("open the object store"):
            self._tree = Tree(Path(root))
        self._warm = WarmFiles(self._tree.descriptor)
        self._threads = Threads(threads, name="objects")
        self._open: set[IncomingFile | Together] = set()

    def writer(self, key: str, *, size: int | None = None) -> AbstractAsyncContextManager[ObjectWriter]:
        return self._writer(validate_key(key), size)

    @asynccontextmanager
    async def _writer(self, key: str, size: int | None) -> AsyncIterator[ObjectWriter]:
        async with self._incoming(IncomingFile(self._tree, key)) as file:
            await self._threads.run(f"write {key}", file.create, size)
            yield _FileWriter(self._threads, file, size)

    @asynccontextmanager
    async def _incoming(self, incoming: Incoming) -> AsyncIterator[Incoming]:
        self._open.add(incoming)
        try:
            yield incoming
        finally:
            # `close` discards those that it finds open.
            if not self._threads.closed:
                self._open.discard(incoming)
                await to_its_end(self._threads.run("clean up", incoming.discard))

    async def put(self, key: str, data: bytes, *, replace: bool = False) -> bool:
        file = IncomingFile(self._tree, validate_key(key))
        return await self._threads.run(f"write {key}", incoming.put, file, data, replace=replace)

    async def put_many(self, objects: Mapping[str, bytes], *, replace: bool = False) -> set[str]:
        # Those of one folder stand together: it is then synced once for all of them.
        return await self._put({key: objects[key] for key in sorted(objects, key=split)}, replace=replace)

    async def put_in_order(self, groups: Sequence[Mapping[str, bytes]]) -> set[str]:
        return await self._put({key: data for group in groups for key, data in group.items()}, replace=False)

    async def _put(self, objects: Mapping[str, bytes], *, replace: bool) -> set[str]:
        for key in objects:
            validate_key(key)
        created: set[str] = set()
        left = iter(objects.items())
        while some := dict(islice(left, _PUT_TOGETHER)):
            async with self._incoming(Together(self._tree, some)) as together:
                await self._threads.run("write objects", together.fill)
                await self._sync(together.files)
                created |= await self._threads.run("write objects", together.reveal, replace=replace)
        return created

    async def _sync(self, files: Sequence[IncomingFile]) -> None:
        if await self._threads.run("write objects", sync_together, [file.descriptor for file in files]):
            return
        shares = (files[first::_PUT_THREADS] for first in range(min(_PUT_THREADS, len(files))))
        # All are waited for, also when one fails: their files are closed next.
        outcomes = await asyncio.gather(
            *(self._threads.run("write objects", sync, share) for share in shares), return_exceptions=True
        )
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    async def get(self, key: str, *, limit: int) -> bytes | None:
        return await self._threads.run(f"read {key}", _get, self._tree, validate_key(key), limit)

    async def get_many(self, keys: Collection[str], *, limit: int) -> dict[str, bytes]:
        for key in keys:
            validate_key(key)
        return await self._threads.run("read objects", _get_many, self._tree, keys, limit)

    def at_once(self, key: str, *, limit: int) -> memoryview | None:
        return self._warm.read(validate_key(key), limit)

    def warm_file(self, key: str, *, limit: int) -> tuple[int, int] | None:
        return self._warm.open(validate_key(key), limit)

    def read(self, key: str, byte_range: ByteRange | None = None) -> AsyncIterator[bytes]:
        return self._read(validate_key(key), byte_range)

    async def _read(self, key: str, byte_range: ByteRange | None) -> AsyncIterator[bytes]:
        doing = f"read {key}"
        with ExitStack() as opened:
            descriptor, size = await self._threads.run(doing, _open, self._tree, key, opened)
            start, end = (byte_range.start, byte_range.end) if byte_range else (0, size)
            if byte_range and not 0 <= start < end <= size:
                raise BadInput(f"{key} has {size} bytes, {start} up to {end} are not among them")
            for position in range(start, end, _READ_TOGETHER):
                length = min(_READ_TOGETHER, end - position)
                yield await self._threads.run(doing, _read_exactly, descriptor, position, length)

    async def head(self, key: str) -> ObjectInfo | None:
        found = await self._threads.run(f"look at {key}", self._tree.stat, validate_key(key))
        return None if found is None else ObjectInfo(key, found.st_size, found.st_mtime)

    async def existing(self, keys: Collection[str]) -> set[str]:
        for key in keys:
            validate_key(key)
        return await self._threads.run("look at objects", self._tree.existing, keys)

    async def delivery(self, key: str) -> LocalFile | None:
        found = await self._threads.run(f"look at {key}", self._tree.stat, validate_key(key))
        return None if found is None else LocalFile(str(self._tree.root / key), found.st_size)

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            validate_key(key)
        await self._threads.run("delete objects", self._tree.remove, keys)

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        return self._list(validate_prefix(prefix))

    async def _list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        found = _objects(self._tree, prefix.removesuffix("/"))
        try:
            while together := await self._threads.run("list objects", _take, found):
                for info in together:
                    yield info
        finally:
            found.close()

    async def leftovers(self, *, older_than: float) -> AsyncIterator[ObjectInfo]:
        async for info in self._abandoned(older_than, remove=False):
            yield info

    async def sweep(self, *, older_than: float) -> int:
        return len([info async for info in self._abandoned(older_than, remove=True)])

    async def _abandoned(self, older_than: float, *, remove: bool) -> AsyncIterator[ObjectInfo]:
        met = incoming.abandoned(self._tree, older_than=older_than, remove=remove)
        try:
            while together := await self._threads.run("look for leftovers", _take, met):
                for info in together:
                    if info:
                        yield info
        finally:
            met.close()

    async def close(self) -> None:
        if self._threads.closed:
            return
        await self._threads.close()
        await asyncio.to_thread(_discard, self._open)
        self._warm.close()
        self._tree.close()


class _FileWriter:
    """Gathers small writes, so that each turn of a thread is worth its while."""

    def __init__(self, threads: Threads, file: IncomingFile, size: int | None) -> None:
        self._threads = threads
        self._file = file
        self._size = size
        self._written = 0
        self._pending = bytearray()
        # False while something is at work, and so for ever when that fails: a part of the object may be missing.
        self._usable = True

    async def write(self, data: bytes | memoryview) -> None:
        self._take_up()
        length = memoryview(data).nbytes
        self._written += length
        if len(self._pending) + length < _WRITTEN_TOGETHER:
            self._pending += data
        else:
            pending, self._pending = self._pending, bytearray()
            await self._threads.run(f"write {self._file.key}", self._file.write, pending, data)
        self._usable = True

    async def commit(self, *, replace: bool = False) -> bool:
        self._take_up()
        if self._size not in (None, self._written):
            raise Mismatch(f"{self._file.key} was to have {self._size} bytes, {self._written} were written")
        return await self._threads.run(f"write {self._file.key}", self._file.finish, self._pending, replace=replace)

    def _take_up(self) -> None:
        if not self._usable:
            raise StoreError(f"{self._file.key}: nothing can be written after a commit or an error")
        self._usable = False


# What follows blocks, and runs in threads.


def _discard(open_: Iterable[IncomingFile | Together]) -> None:
    for one in open_:
        one.discard()


def _open(tree: Tree, key: str, opened: ExitStack) -> tuple[int, int]:
    found = tree.open_file(key)
    if found is None:
        raise NotFound(f"there is no object {key}")
    opened.callback(os.close, found[0])
    return found


def _get(tree: Tree, key: str, limit: int) -> bytes | None:
    with ExitStack() as opened:
        try:
            descriptor, size = _open(tree, key, opened)
        except NotFound:
            return None
        if size > limit:
            raise TooLarge(f"{key} has {size} bytes, at most {limit} are allowed")
        return _read_exactly(descriptor, 0, size)


def _get_many(tree: Tree, keys: Collection[str], limit: int) -> dict[str, bytes]:
    with closing(tree.open_many(keys)) as opened:
        return {key: _read_exactly(descriptor, 0, size) for key, descriptor, size in opened if size <= limit}


def _read_exactly(descriptor: int, position: int, length: int) -> bytes:
    data = os.pread(descriptor, length, position)
    while len(data) < length:
        more = os.pread(descriptor, length - len(data), position + len(data))
        if not more:
            raise StoreError("the file of an object became shorter while it was read")
        data += more
    return data


def _objects(tree: Tree, path: str) -> Generator[ObjectInfo, None, None]:
    for found in tree.walk(path):
        if is_segment(found.entry.name) and len(found.key) <= MAX_KEY_LENGTH:
            try:
                about = found.entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISREG(about.st_mode):
                yield ObjectInfo(found.key, about.st_size, about.st_mtime)


def _take(found: Iterator[T]) -> Sequence[T]:
    return [*islice(found, _WALKED_TOGETHER)]
