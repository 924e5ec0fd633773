"""What every object store promises, as tests: a subclass gives the fixture `store`, empty and closed afterwards."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import BadInput, Mismatch, NotFound, StoreError, StoreFull, TooLarge
from cachesrv.storage.base import ByteRange, LocalFile, PresignedUrl, Stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cachesrv.storage.base import ObjectStore

LIMIT = 2**24
LARGE = os.urandom(3 * 2**20 + 17)

BAD_KEYS = [
    "",
    "/",
    "/etc/passwd",
    "main/",
    "main//x",
    ".",
    "..",
    "main/../x",
    "main/.hidden",
    ".incoming-0",
    "main/nar/",
    "a\0b",
    "a b",
    "a\nb",
    "a\\b",
    "é",
    "\ud800",
    "x" * 241,
    "x/" * 512 + "x",
]


async def whole(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


async def keys(store: ObjectStore, prefix: str = "") -> list[str]:
    return sorted([info.key async for info in store.list(prefix)])


class StorageContract:
    async def test_a_small_object_comes_back(self, store: ObjectStore) -> None:
        assert await store.put("main/nix-cache-info", b"StoreDir: /nix/store\n")
        assert await store.get("main/nix-cache-info", limit=LIMIT) == b"StoreDir: /nix/store\n"
        assert await whole(store.read("main/nix-cache-info")) == b"StoreDir: /nix/store\n"

    async def test_an_empty_object_is_an_object(self, store: ObjectStore) -> None:
        assert await store.put("main/empty", b"")
        assert await store.get("main/empty", limit=0) == b""
        assert await whole(store.read("main/empty")) == b""
        info = await store.head("main/empty")
        assert info is not None
        assert info.size == 0

    async def test_what_is_not_there(self, store: ObjectStore) -> None:
        await store.put("main/a", b"a")
        for key in ("main/b", "main/c/d", "other/a", "main"):
            assert await store.get(key, limit=LIMIT) is None
            assert await store.head(key) is None
            assert isinstance(await store.delivery(key), PresignedUrl | None)
            with pytest.raises(NotFound):
                await whole(store.read(key))

    async def test_names_with_all_characters_that_nix_uses(self, store: ObjectStore) -> None:
        names = [
            "syd87l2rxw8cbsxmxl853h0r6pdwhwjr.narinfo",
            "main/nar/1w1fff338fvdw53sqgamddn1b2xgds473pv6y13gizdbqjv4i5p3.nar.zst",
            "main/log/0010hhk3z3l5ajdrr5qkqdvkrbmb5h5w-gtk+3-1.0_a?b=c.drv",
            "main/realisations/sha256:ba7816bf8f01cfea414140de5dae2223b00361a3!out.doi",
            "main/build-trace-v2/hash-name.drv/out.doi",
            "main/%21/~x^y,z@1",
            "x" * 240,
        ]
        for name in names:
            assert await store.put(name, name.encode())
        assert await keys(store) == sorted(names)
        for name in names:
            assert await store.get(name, limit=LIMIT) == name.encode()

    @pytest.mark.parametrize("key", BAD_KEYS, ids=[f"bad{n}" for n in range(len(BAD_KEYS))])
    async def test_bad_keys_are_refused_everywhere(self, store: ObjectStore, key: str) -> None:
        with pytest.raises(BadInput):
            async with store.writer(key):
                pass
        with pytest.raises(BadInput):
            await store.put(key, b"x")
        with pytest.raises(BadInput):
            await store.put_many({"main/fine": b"x", key: b"x"})
        with pytest.raises(BadInput):
            await store.get(key, limit=LIMIT)
        with pytest.raises(BadInput):
            await whole(store.read(key))
        with pytest.raises(BadInput):
            await store.head(key)
        with pytest.raises(BadInput):
            await store.delete(["main/fine", key])
        with pytest.raises(BadInput):
            await store.delivery(key)
        assert await keys(store) == []

    @pytest.mark.parametrize("prefix", ["main", "/", "../", "main/../", ".x/", "a//", "main/n"])
    async def test_bad_prefixes_are_refused(self, store: ObjectStore, prefix: str) -> None:
        with pytest.raises(BadInput):
            await keys(store, prefix)

    async def test_put_leaves_what_is_there_unless_told_to_replace(self, store: ObjectStore) -> None:
        assert await store.put("main/a", b"first")
        assert not await store.put("main/a", b"second, and longer")
        assert await store.get("main/a", limit=LIMIT) == b"first"
        assert await store.put("main/a", b"3rd", replace=True)
        assert await store.get("main/a", limit=LIMIT) == b"3rd"
        assert await store.put("main/b", b"new", replace=True)

    async def test_of_several_at_once_exactly_one_creates(self, store: ObjectStore) -> None:
        contents = [b"%d" % n * 1000 for n in range(12)]
        created = await asyncio.gather(*(store.put("main/a", content) for content in contents))
        assert created.count(True) == 1
        assert await store.get("main/a", limit=LIMIT) == contents[created.index(True)]

    async def test_get_has_a_limit(self, store: ObjectStore) -> None:
        await store.put("main/a", b"12345")
        assert await store.get("main/a", limit=5) == b"12345"
        with pytest.raises(TooLarge):
            await store.get("main/a", limit=4)

    async def test_many_are_read_together(self, store: ObjectStore) -> None:
        objects = {f"main/{number}.narinfo": b"%d" % number for number in range(70)} | {"main/nar/x": b"x", "y": b""}
        await store.put_many(objects)
        asked = [*objects, "main/never-there", "nowhere/at/all", "main/nar"]
        assert await store.get_many(asked, limit=LIMIT) == objects
        assert await store.get_many(asked, limit=1) == {key: data for key, data in objects.items() if len(data) <= 1}
        assert await store.get_many([], limit=1) == {}
        with pytest.raises(BadInput):
            await store.get_many(["y", "../up"], limit=1)

    async def test_of_many_those_that_are_there(self, store: ObjectStore) -> None:
        objects = {f"main/{number}.narinfo": b"%d" % number for number in range(70)} | {"main/nar/x": b"x", "y": b""}
        await store.put_many(objects)
        assert await store.existing([*objects, "main/never-there", "nowhere/at/all", "main/nar"]) == objects.keys()
        assert await store.existing(["main/never-there"]) == set()
        assert await store.existing([]) == set()
        with pytest.raises(BadInput):
            await store.existing(["y", "../up"])

    async def test_what_is_had_at_once_is_whole(self, store: ObjectStore) -> None:
        """Or nothing: nobody promises that it is in memory."""
        objects = {"main/empty": b"", "main/small": b"12345", "main/large": LARGE}
        await store.put_many(objects)
        for key, data in objects.items():
            for limit in (len(data) - 1, len(data), 2**30):
                found = store.at_once(key, limit=limit)
                assert found is None or (bytes(found) == data and limit >= len(data))
        assert store.at_once("main/missing", limit=LIMIT) is None
        assert store.at_once("main", limit=LIMIT) is None
        await store.put("main/small", b"1", replace=True)
        assert bytes(store.at_once("main/small", limit=LIMIT) or b"1") == b"1"
        await store.delete(["main/small"])
        assert store.at_once("main/small", limit=LIMIT) is None
        with pytest.raises(BadInput):
            store.at_once("main/../top", limit=LIMIT)

    async def test_head_tells_size_and_time(self, store: ObjectStore) -> None:
        before = time.time()
        await store.put("main/a", b"12345")
        info = await store.head("main/a")
        assert info is not None
        assert (info.key, info.size) == ("main/a", 5)
        # Stores may keep whole seconds, and have a clock of their own.
        assert before - 5 < info.modified < time.time() + 5

    async def test_many_are_put_together(self, store: ObjectStore) -> None:
        objects = {f"main/{n % 3}/{n}": b"%d" % n for n in range(150)}
        assert await store.put_many(objects) == set(objects)
        assert await keys(store) == sorted(objects)
        assert await store.get("main/0/99", limit=LIMIT) == b"99"
        assert await store.put_many({}) == set()

    async def test_groups_are_put_in_order(self, store: ObjectStore) -> None:
        await store.put("main/1", b"old")
        groups = [{f"main/{n}": b"%d" % n for n in range(start, start + 100)} for start in (300, 100, 0, 200)]
        assert await store.put_in_order(groups) == {f"main/{n}" for n in range(400)} - {"main/1"}
        assert await store.get("main/1", limit=LIMIT) == b"old"
        assert await store.get("main/399", limit=LIMIT) == b"399"
        assert await store.put_in_order([]) == await store.put_in_order([{}, {"main/1": b"new"}]) == set()
        with pytest.raises(BadInput):
            await store.put_in_order([{"main/x": b""}, {"../up": b""}])

    async def test_many_leave_what_is_there_unless_told_to_replace(self, store: ObjectStore) -> None:
        await store.put("main/a", b"old")
        assert await store.put_many({"main/a": b"new", "main/b": b"new"}) == {"main/b"}
        assert await store.get("main/a", limit=LIMIT) == b"old"
        assert await store.put_many({"main/a": b"new", "main/b": b"newer"}, replace=True) == {"main/a", "main/b"}
        assert await store.get("main/a", limit=LIMIT) == b"new"
        assert await store.get("main/b", limit=LIMIT) == b"newer"

    @pytest.mark.parametrize("size", [None, len(LARGE)])
    async def test_a_large_object_is_written_in_pieces(self, store: ObjectStore, size: int | None) -> None:
        async with store.writer("main/nar/large", size=size) as writer:
            position = 0
            for length in (1, 0, 100_000, 2**20, 5, 2**20 + 3, len(LARGE)):
                await writer.write(LARGE[position : position + length])
                position += length
            assert await writer.commit()
        assert await whole(store.read("main/nar/large")) == LARGE
        info = await store.head("main/nar/large")
        assert info is not None
        assert info.size == len(LARGE)

    async def test_the_buffer_of_a_write_can_be_used_again(self, store: ObjectStore) -> None:
        buffer = bytearray(700_000)
        written = []
        async with store.writer("main/a") as writer:
            for n in range(4):
                buffer[:] = bytes([n]) * len(buffer)
                await writer.write(memoryview(buffer)[: len(buffer) - n])
                written.append(bytes(buffer[: len(buffer) - n]))
            buffer[:] = b"x" * len(buffer)
            await writer.commit()
        assert await whole(store.read("main/a")) == b"".join(written)

    async def test_an_object_is_not_visible_before_its_commit(self, store: ObjectStore) -> None:
        async with store.writer("main/nar/a") as writer:
            await writer.write(LARGE)
            assert await store.get("main/nar/a", limit=LIMIT) is None
            assert await store.head("main/nar/a") is None
            assert await keys(store) == []
            assert await writer.commit()
            assert await keys(store) == ["main/nar/a"]
        assert await keys(store) == ["main/nar/a"]

    async def test_leaving_without_commit_leaves_nothing(self, store: ObjectStore) -> None:
        async with store.writer("main/a") as writer:
            await writer.write(LARGE)
        assert await store.head("main/a") is None
        assert await keys(store) == []

    async def test_an_error_on_the_way_leaves_what_was_there(self, store: ObjectStore) -> None:
        await store.put("main/a", b"old")

        async def fail() -> None:
            async with store.writer("main/a") as writer:
                await writer.write(LARGE)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        assert await store.get("main/a", limit=LIMIT) == b"old"

    async def test_a_cancelled_writer_leaves_nothing(self, store: ObjectStore) -> None:
        writing = asyncio.Event()

        async def write_for_ever() -> None:
            async with store.writer("main/a") as writer:
                while True:
                    await writer.write(b"x" * 2**20)
                    writing.set()
                    await asyncio.sleep(0.001)

        task = asyncio.create_task(write_for_ever())
        await writing.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await store.head("main/a") is None
        assert await store.put("main/a", b"later")

    async def test_a_put_that_is_cancelled_is_whole_or_not_at_all(self, store: ObjectStore) -> None:
        for delay in (0, 0, 0.0005, 0.001, 0.002):
            task = asyncio.create_task(store.put("main/a", LARGE))
            await asyncio.sleep(delay)
            task.cancel()
            await asyncio.wait([task])
            assert await store.get("main/a", limit=LIMIT) in (None, LARGE)

    async def test_commit_leaves_what_is_there_unless_told_to_replace(self, store: ObjectStore) -> None:
        await store.put("main/a", b"old")
        async with store.writer("main/a") as writer:
            await writer.write(b"new")
            assert not await writer.commit()
        assert await store.get("main/a", limit=LIMIT) == b"old"
        async with store.writer("main/a") as writer:
            await writer.write(b"new")
            assert await writer.commit(replace=True)
        assert await store.get("main/a", limit=LIMIT) == b"new"
        assert await keys(store) == ["main/a"]

    async def test_of_several_writers_exactly_one_creates(self, store: ObjectStore) -> None:
        together = asyncio.Barrier(5)

        async def write(content: bytes) -> bool:
            async with store.writer("main/a", size=len(content)) as writer:
                await writer.write(content)
                await together.wait()
                return await writer.commit()

        contents = [bytes([n]) * 1_200_000 for n in range(5)]
        created = await asyncio.gather(*map(write, contents))
        assert created.count(True) == 1
        assert await store.get("main/a", limit=LIMIT) == contents[created.index(True)]

    async def test_after_a_commit_nothing_can_be_written(self, store: ObjectStore) -> None:
        async with store.writer("main/a") as writer:
            await writer.write(b"all")
            await writer.commit()
            with pytest.raises(StoreError):
                await writer.write(b"more")
            with pytest.raises(StoreError):
                await writer.commit(replace=True)
        assert await store.get("main/a", limit=LIMIT) == b"all"

    @pytest.mark.parametrize("written", [b"", b"1234", b"123456"])
    async def test_another_size_than_stated_is_not_committed(self, store: ObjectStore, written: bytes) -> None:
        async with store.writer("main/a", size=5) as writer:
            await writer.write(written)
            with pytest.raises(Mismatch):
                await writer.commit()
        assert await store.head("main/a") is None

    async def test_a_size_that_cannot_fit_is_refused_at_once(self, store: ObjectStore) -> None:
        with pytest.raises(StoreFull):
            async with store.writer("main/a", size=2**60):
                pytest.fail("it was let in")
        assert await keys(store) == []

    @pytest.mark.parametrize(
        ("start", "end"),
        [(0, 1), (0, len(LARGE)), (5, 6), (2**19 - 1, 2**19 + 1), (1000, 2**21), (len(LARGE) - 1, len(LARGE))],
    )
    async def test_a_part_is_read(self, store: ObjectStore, start: int, end: int) -> None:
        await store.put("main/a", LARGE)
        assert await whole(store.read("main/a", ByteRange(start, end))) == LARGE[start:end]

    @pytest.mark.parametrize(("start", "end"), [(0, 6), (5, 6), (100, 200), (-1, 3), (3, 3), (4, 2)])
    async def test_a_part_beyond_the_end_is_refused(self, store: ObjectStore, start: int, end: int) -> None:
        await store.put("main/a", b"12345")
        with pytest.raises(BadInput):
            await whole(store.read("main/a", ByteRange(start, end)))
        with pytest.raises(NotFound):
            await whole(store.read("main/b", ByteRange(0, 1)))

    async def test_a_large_object_is_read_in_chunks(self, store: ObjectStore) -> None:
        await store.put("main/a", LARGE)
        sizes = [len(chunk) async for chunk in store.read("main/a")]
        assert sum(sizes) == len(LARGE)
        assert min(sizes) > 0
        assert max(sizes) <= 2**20

    async def test_reading_can_stop_anywhere(self, store: ObjectStore) -> None:
        await store.put("main/a", LARGE)
        chunks = store.read("main/a")
        first = await anext(chunks)
        assert LARGE.startswith(first)
        await chunks.aclose()  # type: ignore[attr-defined]  # all are generators
        assert await whole(store.read("main/a")) == LARGE

    async def test_delete(self, store: ObjectStore) -> None:
        await store.put_many({"main/a": b"a", "main/nar/b": b"b", "main/nar/c": b"c"})
        await store.delete(["main/nar/b", "main/unknown", "nowhere/at/all", "main/a", "main/nar"])
        assert await keys(store) == ["main/nar/c"]
        assert await store.get("main/a", limit=LIMIT) is None
        assert await store.put("main/a", b"again")
        await store.delete([])

    async def test_list_by_prefix(self, store: ObjectStore) -> None:
        objects = {"main/a": b"1", "main/nar/b": b"22", "main/nar/x/c": b"333", "main2/a": b"", "top": b"4444"}
        await store.put_many(objects)
        assert await keys(store) == sorted(objects)
        assert await keys(store, "main/") == ["main/a", "main/nar/b", "main/nar/x/c"]
        assert await keys(store, "main/nar/") == ["main/nar/b", "main/nar/x/c"]
        assert await keys(store, "nowhere/") == []
        assert await keys(store, "top/") == []
        found = [info async for info in store.list("main/nar/")]
        assert {(info.key, info.size) for info in found} == {("main/nar/b", 2), ("main/nar/x/c", 3)}
        assert all(info.modified > 1_500_000_000 for info in found)

    async def test_list_goes_on_while_objects_come_and_go(self, store: ObjectStore) -> None:
        objects = {f"main/{n % 7}/{n}": b"" for n in range(1200)}
        await store.put_many(objects)
        seen = set()
        async for info in store.list("main/"):
            seen.add(info.key)
            if len(seen) == 10:
                await store.delete([f"main/{n % 7}/{n}" for n in range(600, 700)])
                await store.put("main/8/new", b"")
        assert {key for key in objects if not 600 <= int(key.split("/")[-1]) < 700} <= seen

    async def test_list_can_stop_anywhere(self, store: ObjectStore) -> None:
        await store.put_many({f"main/{n}": b"" for n in range(20)})
        found = store.list("main/")
        await anext(found)
        await found.aclose()  # type: ignore[attr-defined]  # all are generators
        assert len(await keys(store, "main/")) == 20

    async def test_delivery_leads_to_the_object(self, store: ObjectStore) -> None:
        await store.put("main/nar/a", LARGE)
        delivery = await store.delivery("main/nar/a")
        assert delivery is not None
        if isinstance(delivery, LocalFile):
            assert delivery.size == len(LARGE)
            assert await asyncio.to_thread(Path(delivery.path).read_bytes) == LARGE
        elif isinstance(delivery, Stream):
            assert delivery.size == len(LARGE)

    async def test_sweep_takes_neither_objects_nor_what_is_being_written(self, store: ObjectStore) -> None:
        await store.put("main/a", b"a")
        async with store.writer("main/b") as writer:
            await writer.write(LARGE)
            assert [info async for info in store.leftovers(older_than=3600)] == []
            assert await store.sweep(older_than=3600) == 0
            await writer.write(LARGE)
            assert await writer.commit()
        assert await keys(store) == ["main/a", "main/b"]
        assert await whole(store.read("main/b")) == LARGE + LARGE

    async def test_a_closed_store_says_so(self, store: ObjectStore) -> None:
        await store.put("main/a", b"a")
        async with store.writer("main/b") as writer:
            await writer.write(b"b")
            await store.close()
            with pytest.raises(StoreError):
                await writer.commit()
        with pytest.raises(StoreError):
            await store.get("main/a", limit=LIMIT)
        with pytest.raises(StoreError):
            await store.put("main/c", b"c")
        with pytest.raises(StoreError):
            await whole(store.read("main/a"))
        with pytest.raises(StoreError):
            await keys(store)
        await store.close()
