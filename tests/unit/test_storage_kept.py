"""A store with a disk cache beside it: what is written is in both, and the disk cache is never in the way."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import BadInput, Mismatch, StoreError, StoreFull
from cachesrv.storage.disk_cache import DiskCache
from cachesrv.storage.kept import KeepingStore
from cachesrv.storage.memory import MemoryStore
from cachesrv.storage.no_cache import NoCache
from tests.contracts.storage_contract import StorageContract

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

LIMIT = 10_000
NAR = "main/nar/a"


class TestKeepingStore(StorageContract):
    """It is a store like any other."""

    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[KeepingStore]:
        cache = DiskCache(tmp_path, limit=2**22)
        store = KeepingStore(MemoryStore(), cache, lambda key: "/" in key)
        yield store
        await store.close()
        await cache.close()


@pytest.fixture
async def disk_cache(tmp_path: Path) -> AsyncIterator[DiskCache]:
    cache = DiskCache(tmp_path, limit=LIMIT)
    await cache.open()
    yield cache
    await cache.close()


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def store(memory: MemoryStore, disk_cache: DiskCache) -> KeepingStore:
    return KeepingStore(memory, disk_cache, lambda key: "/nar/" in key)


async def kept(disk_cache: DiskCache, key: str = NAR) -> bytes | None:
    found = await disk_cache.get(key)
    if found is None:
        return None
    with open(found.path, "rb") as file:  # noqa: ASYNC230, PTH123  a small file
        return file.read()


async def stream(store: KeepingStore, data: bytes, *, size: int | None = None, replace: bool = False) -> bool:
    async with store.writer(NAR, size=size) as writer:
        await writer.write(memoryview(data)[:3])
        await writer.write(data[3:])
        return await writer.commit(replace=replace)


@pytest.mark.parametrize("size", [7, None])
async def test_what_is_streamed_is_kept(store: KeepingStore, disk_cache: DiskCache, size: int | None) -> None:
    assert await stream(store, b"content", size=size)
    assert await store.get(NAR, limit=100) == b"content"
    assert await kept(disk_cache) == b"content"


async def test_what_is_put_is_kept(store: KeepingStore, disk_cache: DiskCache) -> None:
    assert await store.put(NAR, b"content")
    assert await store.put_many({"main/nar/b": b"b", "main/x.narinfo": b"x"}) == {"main/nar/b", "main/x.narinfo"}
    assert [await kept(disk_cache, key) for key in (NAR, "main/nar/b", "main/x.narinfo")] == [b"content", b"b", None]


async def test_what_is_no_nar_is_not_kept(store: KeepingStore, disk_cache: DiskCache) -> None:
    async with store.writer("main/log/a") as writer:
        await writer.write(b"log")
        await writer.commit()
    await store.put("main/x.narinfo", b"narinfo")
    assert await disk_cache.used() == 0


async def test_what_the_store_has_already_is_not_kept_again(
    store: KeepingStore, memory: MemoryStore, disk_cache: DiskCache
) -> None:
    await memory.put(NAR, b"first")
    assert not await store.put(NAR, b"second")
    assert not await stream(store, b"third")
    assert await kept(disk_cache) is None
    assert await disk_cache.used() == 0


async def test_what_replaces_something_replaces_it_here_too(store: KeepingStore, disk_cache: DiskCache) -> None:
    await store.put(NAR, b"first")
    await store.put(NAR, b"second", replace=True)
    assert await kept(disk_cache) == b"second"
    await stream(store, b"third", replace=True)
    assert await kept(disk_cache) == b"third"
    assert await disk_cache.used() == 5


async def test_what_is_left_is_nowhere(store: KeepingStore, disk_cache: DiskCache) -> None:
    async with store.writer(NAR) as writer:
        await writer.write(b"content")
    with pytest.raises(Mismatch):
        await stream(store, b"content", size=8)
    assert await store.head(NAR) is None
    assert await kept(disk_cache) is None
    assert await disk_cache.used() == 0


async def test_what_is_deleted_is_gone_from_both(store: KeepingStore, disk_cache: DiskCache) -> None:
    await store.put_many({NAR: b"a", "main/nar/b": b"b"})
    await store.delete([NAR, "main/nar/b", "main/nar/never-there"])
    assert await store.head(NAR) is None
    assert await disk_cache.used() == 0


async def test_what_has_no_room_here_is_written_all_the_same(store: KeepingStore, disk_cache: DiskCache) -> None:
    large = bytes(LIMIT + 1)
    for size in (len(large), None):
        assert await stream(store, large, size=size)
        assert await store.get(NAR, limit=len(large)) == large
        assert await kept(disk_cache) is None
        await store.delete([NAR])
    assert await store.put(NAR, large)
    assert await kept(disk_cache) is None
    assert await disk_cache.used() == 0


async def test_without_a_disk_cache_all_is_written(memory: MemoryStore) -> None:
    store = KeepingStore(memory, NoCache(), lambda _: True)
    assert await stream(store, b"content")
    assert await store.put("main/nar/b", b"b")
    await store.delete([NAR])
    assert await memory.get("main/nar/b", limit=9) == b"b"
    with pytest.raises(BadInput):
        await store.put("../up", b"")


@pytest.mark.parametrize("failing", ["write", "sync", "reveal", "discard"])
async def test_a_disk_cache_that_breaks_is_not_in_the_way(
    store: KeepingStore,
    memory: MemoryStore,
    disk_cache: DiskCache,
    failing: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(f"cachesrv.storage.incoming.IncomingFile.{failing}", fail)
    assert await stream(store, b"content", size=7)
    assert await store.put("main/nar/b", b"b")
    assert await memory.get(NAR, limit=9) == b"content"
    assert await memory.get("main/nar/b", limit=9) == b"b"


async def test_a_store_that_fails_keeps_nothing(
    store: KeepingStore, disk_cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> bool:
        raise StoreFull("the bucket is full")

    monkeypatch.setattr(MemoryStore, "put", fail)
    with pytest.raises(StoreFull):
        await store.put(NAR, b"content")
    assert await disk_cache.used() == 0


async def test_who_is_cancelled_leaves_nothing(store: KeepingStore, disk_cache: DiskCache) -> None:
    reached = asyncio.Event()

    async def work() -> None:
        async with store.writer(NAR, size=7) as writer:
            await writer.write(b"con")
            reached.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await store.head(NAR) is None
    assert await disk_cache.used() == 0


async def test_it_is_closed_once_and_the_disk_cache_by_its_owner(store: KeepingStore, disk_cache: DiskCache) -> None:
    await store.put(NAR, b"content")
    await store.close()
    with pytest.raises(StoreError):
        await store.put("main/nar/b", b"")
    assert await kept(disk_cache) == b"content"
