"""An object store of which some objects, when they are written, are kept on local disk as well.

What was just pushed is asked for next, and should not have to come back from afar. Keeping is a favour: where the disk
cache has no room, or breaks, the object is written all the same.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING

from cachesrv.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from cachesrv.storage.base import (
        ByteRange,
        Delivery,
        IncomingObject,
        LocalCopy,
        ObjectCache,
        ObjectInfo,
        ObjectStore,
        ObjectWriter,
    )


class KeptCopies:
    """See `cachesrv.storage.base.LocalCopies`: they are kept in a disk cache."""

    def __init__(self, disk_cache: ObjectCache) -> None:
        self._disk_cache = disk_cache

    @asynccontextmanager
    async def begin(self, key: str, size: int | None = None) -> AsyncIterator[LocalCopy]:
        async with AsyncExitStack() as stack:
            try:
                incoming = await stack.enter_async_context(self._disk_cache.incoming(key, size))
            except StoreError:
                incoming = None
            yield _Copy(self._disk_cache, key, incoming)


class _Copy:
    """After the disk cache has failed once, there is none; what it has under the same key goes all the same."""

    def __init__(self, disk_cache: ObjectCache, key: str, incoming: IncomingObject | None) -> None:
        self._disk_cache = disk_cache
        self._key = key
        self._incoming = incoming

    async def write(self, data: bytes | memoryview) -> None:
        if self._incoming:
            try:
                await self._incoming.write(bytes(data))
            except StoreError:
                self._incoming = None

    async def keep(self) -> None:
        with suppress(StoreError):
            await self._disk_cache.discard(self._key)
            if self._incoming:
                await self._incoming.commit()


class KeepingStore:
    """See `cachesrv.storage.base.ObjectStore`. `keeps` says of a key whether its object is kept."""

    def __init__(self, store: ObjectStore, disk_cache: ObjectCache, keeps: Callable[[str], bool]) -> None:
        self._store = store
        self._disk_cache = disk_cache
        self._copies = KeptCopies(disk_cache)
        self._keeps = keeps

    def writer(self, key: str, *, size: int | None = None) -> AbstractAsyncContextManager[ObjectWriter]:
        return self._writer(key, size) if self._keeps(key) else self._store.writer(key, size=size)

    @asynccontextmanager
    async def _writer(self, key: str, size: int | None) -> AsyncIterator[ObjectWriter]:
        async with self._store.writer(key, size=size) as writer, self._copies.begin(key, size) as copy:
            yield _KeepingWriter(writer, copy)

    async def put(self, key: str, data: bytes, *, replace: bool = False) -> bool:
        created = await self._store.put(key, data, replace=replace)
        if created and self._keeps(key):
            await self._keep(key, data)
        return created

    async def _keep(self, key: str, data: bytes) -> None:
        async with self._copies.begin(key, len(data)) as copy:
            await copy.write(data)
            await copy.keep()

    async def put_many(self, objects: Mapping[str, bytes], *, replace: bool = False) -> set[str]:
        created = await self._store.put_many(objects, replace=replace)
        await self._keep_all({key: objects[key] for key in created})
        return created

    async def put_in_order(self, groups: Sequence[Mapping[str, bytes]]) -> set[str]:
        created = await self._store.put_in_order(groups)
        await self._keep_all({key: data for group in groups for key, data in group.items() if key in created})
        return created

    async def _keep_all(self, objects: Mapping[str, bytes]) -> None:
        for key, data in objects.items():
            if self._keeps(key):
                await self._keep(key, data)

    async def get(self, key: str, *, limit: int) -> bytes | None:
        return await self._store.get(key, limit=limit)

    async def get_many(self, keys: Collection[str], *, limit: int) -> dict[str, bytes]:
        return await self._store.get_many(keys, limit=limit)

    def at_once(self, key: str, *, limit: int) -> bytes | memoryview | None:
        return self._store.at_once(key, limit=limit)

    def warm_file(self, key: str, *, limit: int) -> tuple[int, int] | None:
        return self._store.warm_file(key, limit=limit)

    def read(self, key: str, byte_range: ByteRange | None = None) -> AsyncIterator[bytes]:
        return self._store.read(key, byte_range)

    async def existing(self, keys: Collection[str]) -> set[str]:
        return await self._store.existing(keys)

    async def head(self, key: str) -> ObjectInfo | None:
        return await self._store.head(key)

    async def delete(self, keys: Sequence[str]) -> None:
        # In this order: what is asked for meanwhile is not fetched once more, to be kept after all.
        await self._store.delete(keys)
        for key in keys:
            if self._keeps(key):
                await self._disk_cache.discard(key)

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        return self._store.list(prefix)

    async def delivery(self, key: str) -> Delivery | None:
        return await self._store.delivery(key)

    def leftovers(self, *, older_than: float) -> AsyncIterator[ObjectInfo]:
        return self._store.leftovers(older_than=older_than)

    async def sweep(self, *, older_than: float) -> int:
        return await self._store.sweep(older_than=older_than)

    async def close(self) -> None:
        await self._store.close()


class _KeepingWriter:
    """Writes to the store, and a copy."""

    def __init__(self, writer: ObjectWriter, copy: LocalCopy) -> None:
        self._writer = writer
        self._copy = copy

    async def write(self, data: bytes | memoryview) -> None:
        await self._writer.write(data)
        await self._copy.write(data)

    async def commit(self, *, replace: bool = False) -> bool:
        created = await self._writer.commit(replace=replace)
        if created:
            await self._copy.keep()
        return created
