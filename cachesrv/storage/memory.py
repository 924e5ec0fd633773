"""Objects in the memory of one process: for tests, and for caches that live shortly. They survive nothing."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, Mismatch, NotFound, StoreError, StoreFull, TooLarge
from cachesrv.storage.base import ObjectInfo, Stream, validate_key, validate_prefix

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from cachesrv.storage.base import ByteRange, ObjectWriter

_READ_TOGETHER = 2**18


class MemoryStore:
    """See `cachesrv.storage.base.ObjectStore`. Holds at most `capacity` bytes, what is being written included."""

    def __init__(self, *, capacity: int = 2**30) -> None:
        self._capacity = capacity
        self._objects: dict[str, tuple[bytes, float]] = {}
        self._used = 0
        self._closed = False

    def writer(self, key: str, *, size: int | None = None) -> AbstractAsyncContextManager[ObjectWriter]:
        return self._writer(validate_key(key), size)

    @asynccontextmanager
    async def _writer(self, key: str, size: int | None) -> AsyncIterator[ObjectWriter]:
        self._demand_open()
        if size is not None and size > self._capacity - self._used:
            raise StoreFull(f"no room for {key}: {size} bytes are needed, {self._capacity - self._used} are free")
        writer = _MemoryWriter(self, key, size)
        try:
            yield writer
        finally:
            writer.abort()

    async def put(self, key: str, data: bytes, *, replace: bool = False) -> bool:
        async with self.writer(key, size=len(data)) as writer:
            await writer.write(data)
            return await writer.commit(replace=replace)

    async def put_many(self, objects: Mapping[str, bytes], *, replace: bool = False) -> set[str]:
        for key in objects:
            validate_key(key)
        return {key for key, data in objects.items() if await self.put(key, data, replace=replace)}

    async def put_in_order(self, groups: Sequence[Mapping[str, bytes]]) -> set[str]:
        return await self.put_many({key: data for group in groups for key, data in group.items()})

    async def get(self, key: str, *, limit: int) -> bytes | None:
        data = self._find(key)
        if data is not None and len(data) > limit:
            raise TooLarge(f"{key} has {len(data)} bytes, at most {limit} are allowed")
        return data

    async def get_many(self, keys: Collection[str], *, limit: int) -> dict[str, bytes]:
        found = {key: self._find(validate_key(key)) for key in keys}
        return {key: data for key, data in found.items() if data is not None and len(data) <= limit}

    def at_once(self, key: str, *, limit: int) -> bytes | None:
        data = self._find(validate_key(key))
        return data if data is not None and len(data) <= limit else None

    def warm_file(self, key: str, *, limit: int) -> None:  # noqa: ARG002  there are no files
        validate_key(key)

    def read(self, key: str, byte_range: ByteRange | None = None) -> AsyncIterator[bytes]:
        return self._read(validate_key(key), byte_range)

    async def _read(self, key: str, byte_range: ByteRange | None) -> AsyncIterator[bytes]:
        data = self._find(key)
        if data is None:
            raise NotFound(f"there is no object {key}")
        start, end = (byte_range.start, byte_range.end) if byte_range else (0, len(data))
        if byte_range and not 0 <= start < end <= len(data):
            raise BadInput(f"{key} has {len(data)} bytes, {start} up to {end} are not among them")
        for position in range(start, end, _READ_TOGETHER):
            yield data[position : min(position + _READ_TOGETHER, end)]

    async def existing(self, keys: Collection[str]) -> set[str]:
        return {key for key in keys if self._find(validate_key(key)) is not None}

    async def head(self, key: str) -> ObjectInfo | None:
        if self._find(key) is None:
            return None
        data, modified = self._objects[key]
        return ObjectInfo(key, len(data), modified)

    async def delivery(self, key: str) -> Stream | None:
        data = self._find(key)
        return None if data is None else Stream(len(data))

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            validate_key(key)
        self._demand_open()
        for key in keys:
            data, _ = self._objects.pop(key, (b"", 0))
            self._used -= len(data)

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        return self._list(validate_prefix(prefix))

    async def _list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        self._demand_open()
        for key, (data, modified) in [*self._objects.items()]:
            if key.startswith(prefix):
                yield ObjectInfo(key, len(data), modified)

    async def leftovers(self, *, older_than: float) -> AsyncIterator[ObjectInfo]:  # noqa: ARG002  # they are gone at once
        self._demand_open()
        none: tuple[ObjectInfo, ...] = ()
        for info in none:
            yield info

    async def sweep(self, *, older_than: float) -> int:  # noqa: ARG002  # see leftovers
        self._demand_open()
        return 0

    async def close(self) -> None:
        self._closed = True
        self._objects.clear()

    def take_room(self, length: int) -> None:
        """Account for bytes that a writer holds. Raises StoreFull."""
        self._demand_open()
        if length > self._capacity - self._used:
            raise StoreFull(f"no room: the store holds {self._used} of {self._capacity} bytes")
        self._used += length

    def give_back(self, length: int) -> None:
        self._used -= length

    def store(self, key: str, data: bytes, *, replace: bool) -> bool:
        """Take over the bytes of a writer, unless the object is there and is not to be replaced."""
        self._demand_open()
        if key in self._objects:
            if not replace:
                return False
            self._used -= len(self._objects[key][0])
        self._objects[key] = (data, time.time())
        return True

    def _find(self, key: str) -> bytes | None:
        validate_key(key)
        self._demand_open()
        found = self._objects.get(key)
        return None if found is None else found[0]

    def _demand_open(self) -> None:
        if self._closed:
            raise StoreError("the store is closed")


class _MemoryWriter:
    def __init__(self, store: MemoryStore, key: str, size: int | None) -> None:
        self._store = store
        self._key = key
        self._size = size
        self._data = bytearray()
        self._usable = True

    async def write(self, data: bytes | memoryview) -> None:
        self._take_up()
        self._store.take_room(memoryview(data).nbytes)
        self._data += data
        self._usable = True

    async def commit(self, *, replace: bool = False) -> bool:
        self._take_up()
        if self._size not in (None, len(self._data)):
            raise Mismatch(f"{self._key} was to have {self._size} bytes, {len(self._data)} were written")
        stored = self._store.store(self._key, bytes(self._data), replace=replace)
        if stored:
            self._data = bytearray()
        return stored

    def abort(self) -> None:
        self._usable = False
        self._store.give_back(len(self._data))
        self._data = bytearray()

    def _take_up(self) -> None:
        if not self._usable:
            raise StoreError(f"{self._key}: nothing can be written after a commit or an error")
        self._usable = False
