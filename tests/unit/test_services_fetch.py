"""One fetch for all who wait: whole or not at all, whatever its source, its clients and the disk cache do meanwhile."""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import CachesrvError, Mismatch, PeerError, PeerUnavailable, StoreError, StoreFull
from cachesrv.services import fetch as fetching
from cachesrv.services.alone import read_alone
from cachesrv.services.fetch import Fetches
from cachesrv.storage.base import ByteRange
from cachesrv.storage.disk_cache import DiskCache, Incoming
from tests.waiting import PLENTY

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable
    from pathlib import Path

    from cachesrv.services.fetch import Fetch

LIMIT = 2**24
DATA = os.urandom(1_500_000)
ALL = ByteRange(0, len(DATA))
CHUNK = 100_000


class Source:
    """A Remote whose transfers do, one after the other, what `transfers` say; the last of them again and again."""

    def __init__(
        self,
        *transfers: Callable[[int], AsyncGenerator[bytes, None]],
        size: int | None = len(DATA),
        keep: bool = True,
        right: bytes = DATA,
    ) -> None:
        self.key = "main/nar/a"
        self.size = size
        self.keep = keep
        self.asked_from: list[int] = []
        self.received: list[bytes] = []
        self.refusal: CachesrvError | None = None
        self.no_room: CachesrvError | None = None
        self.stored: bool | StoreError = True
        self._transfers = list(transfers) or [good]
        self._right = sha256(right).digest()

    async def read(self, start: int) -> AsyncGenerator[bytes, None]:
        self.asked_from.append(start)
        transfer = self._transfers.pop(0) if len(self._transfers) > 1 else self._transfers[0]
        async with aclosing(transfer(start)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def receive(self, chunks: AsyncIterator[bytes]) -> None:
        if self.no_room:
            raise self.no_room
        data = b"".join([chunk async for chunk in chunks])
        self.received.append(data)
        if self.refusal:
            raise self.refusal
        if sha256(data).digest() != self._right:
            raise Mismatch("it is not what it should be")

    async def is_stored(self) -> bool:
        if isinstance(self.stored, StoreError):
            raise self.stored
        return self.stored


async def good(start: int) -> AsyncGenerator[bytes, None]:
    for position in range(start, len(DATA), CHUNK):
        await asyncio.sleep(0)
        yield DATA[position : position + CHUNK]


async def altered(start: int) -> AsyncGenerator[bytes, None]:
    async for chunk in good(start):
        yield chunk[:-1] + bytes([chunk[-1] ^ 1])


def cut(after: int, error: Exception | None = None) -> Callable[[int], AsyncGenerator[bytes, None]]:
    """It breaks after so many bytes: with an error, or just so."""

    async def transfer(start: int) -> AsyncGenerator[bytes, None]:
        if after:
            yield DATA[start : start + after]
        if error:
            raise error

    return transfer


def held(
    gate: asyncio.Event, at: int = 0, error: Exception | None = None
) -> Callable[[int], AsyncGenerator[bytes, None]]:
    """It waits for the gate, after so many bytes; and goes on then, or breaks."""

    async def transfer(start: int) -> AsyncGenerator[bytes, None]:
        if at:
            yield DATA[start:at]
        await gate.wait()
        if error:
            raise error
        yield DATA[at:]

    return transfer


broken = cut(0, PeerUnavailable("it broke"))


@pytest.fixture
async def cache(tmp_path: Path) -> AsyncIterator[DiskCache]:
    cache = DiskCache(tmp_path, limit=LIMIT)
    await cache.open()
    yield cache
    await cache.close()


@pytest.fixture
async def fetches(cache: DiskCache) -> AsyncIterator[Fetches]:
    fetches = Fetches(cache)
    yield fetches
    await fetches.close()


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_PAUSE", 0.001)


async def whole(fetch: Fetch, part: ByteRange = ALL) -> bytes:
    return b"".join([chunk async for chunk in fetch.read(part)])


async def as_far_as_it_came(chunks: AsyncGenerator[bytes, None]) -> tuple[bytes, Exception | None]:
    data = b""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                data += chunk
    except CachesrvError as error:
        return data, error
    return data, None


async def settled(fetches: Fetches) -> None:
    if fetches._tasks:
        await asyncio.wait(fetches._tasks)


async def test_what_is_fetched_is_kept(fetches: Fetches, cache: DiskCache) -> None:
    source = Source()
    fetch = fetches.start(source)
    assert await whole(fetch) == DATA
    await settled(fetches)
    assert source.received == [DATA]
    assert fetches.under_way(source.key) is None
    found = await cache.get(source.key)
    assert found
    assert found.size == len(DATA) == await cache.used()


@pytest.mark.parametrize("stored", [False, StoreError("nobody knows")], ids=["deleted", "unknown"])
async def test_what_may_have_been_deleted_meanwhile_is_not_kept(
    fetches: Fetches, cache: DiskCache, stored: bool | StoreError
) -> None:
    source = Source()
    source.stored = stored
    assert await whole(fetches.start(source)) == DATA
    await settled(fetches)
    assert await cache.get(source.key) is None
    assert await cache.used() == 0


async def test_what_is_kept_elsewhere_is_not_kept_here(fetches: Fetches, cache: DiskCache) -> None:
    source = Source(keep=False)
    assert await whole(fetches.start(source)) == DATA
    await settled(fetches)
    assert source.received == [DATA]
    assert await cache.used() == 0


async def test_it_is_fetched_once_however_many_ask(fetches: Fetches) -> None:
    gate = asyncio.Event()
    source = Source(held(gate, 300_000))
    first = fetches.start(source)
    parts = [ALL, ByteRange(0, 10), ByteRange(299_990, 300_010), ByteRange(len(DATA) - 1, len(DATA)), ALL]
    readers = [asyncio.create_task(whole(fetches.start(source), part)) for part in parts]
    await asyncio.sleep(0.05)
    assert fetches.start(source) is fetches.under_way(source.key) is first
    gate.set()
    assert await asyncio.gather(*readers) == [DATA[part.start : part.end] for part in parts]
    assert source.asked_from == [0]


async def test_it_is_passed_on_while_it_comes(fetches: Fetches) -> None:
    gate = asyncio.Event()
    source = Source(held(gate, 300_000))
    async with aclosing(fetches.start(source).read(ALL)) as chunks:
        data = b""
        async for chunk in chunks:
            data += chunk
            if len(data) == 300_000:
                gate.set()
    assert data == DATA


async def test_it_is_followed_where_it_is_written(fetches: Fetches, cache: DiskCache) -> None:
    """Also when its last reader comes to the end after it has left the disk cache."""
    gate = asyncio.Event()
    source = Source(held(gate, 300_000))
    fetch = fetches.start(source)
    data = b""
    async with aclosing(fetch.follow(ByteRange(10, len(DATA)))) as pieces:
        async for piece in pieces:
            data += piece.read()
            if not gate.is_set():
                gate.set()
                await fetch.done()
                await cache.discard(source.key)
    assert data == DATA[10:]
    await settled(fetches)
    assert await cache.used() == 0


async def test_clients_do_not_wait_for_the_disk(
    fetches: Fetches, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk = asyncio.Event()
    commit = Incoming.commit

    async def slow(incoming: Incoming) -> None:
        await on_disk.wait()
        await commit(incoming)

    monkeypatch.setattr(Incoming, "commit", slow)
    source = Source()
    fetch = fetches.start(source)
    assert await asyncio.wait_for(whole(fetch), PLENTY) == DATA
    assert fetches.start(source) is fetch
    assert await cache.get(source.key) is None
    on_disk.set()
    await fetch.done()
    assert await cache.get(source.key)


async def test_what_cannot_be_kept_is_given_out_all_the_same(
    fetches: Fetches, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: Incoming) -> None:
        raise StoreError("the disk is broken")

    monkeypatch.setattr(Incoming, "commit", fail)
    fetch = fetches.start(Source())
    assert await whole(fetch) == DATA
    with pytest.raises(StoreError, match="the disk is broken"):
        await fetch.done()
    await settled(fetches)
    assert await cache.used() == 0


async def test_the_last_byte_waits_until_all_is_found_right(fetches: Fetches) -> None:
    verified = asyncio.Event()

    class Slow(Source):
        async def receive(self, chunks: AsyncIterator[bytes]) -> None:
            await super().receive(chunks)
            await verified.wait()

    data = b""
    async with aclosing(fetches.start(Slow()).read(ALL)) as chunks:
        while len(data) < len(DATA) - 1:
            data += await anext(chunks)
        assert data == DATA[:-1]
        last = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0.05)
        assert not last.done()
        verified.set()
        assert await last == DATA[-1:]


@pytest.mark.parametrize("size", [len(DATA), None])
async def test_what_is_altered_never_arrives_whole(fetches: Fetches, cache: DiskCache, size: int | None) -> None:
    source = Source(altered, size=size)
    data, error = await as_far_as_it_came(fetches.start(source).read(ALL))
    assert isinstance(error, PeerError)
    assert len(data) < len(DATA)
    await settled(fetches)
    assert await cache.used() == 0


async def test_what_is_longer_than_announced_never_arrives_whole(fetches: Fetches, cache: DiskCache) -> None:
    source = Source(size=len(DATA) - 1, right=DATA[:-1])
    data, error = await as_far_as_it_came(fetches.start(source).read(ByteRange(0, len(DATA) - 1)))
    assert isinstance(error, PeerError)
    assert len(data) < len(DATA) - 1
    await settled(fetches)
    assert await cache.used() == 0


async def test_a_transfer_that_breaks_is_resumed_where_it_broke(fetches: Fetches) -> None:
    source = Source(cut(1000), cut(500, PeerUnavailable("reset")), cut(0), good)
    assert await whole(fetches.start(source)) == DATA
    assert source.asked_from == [0, 1000, 1500, 1500]


async def test_one_that_always_breaks_but_comes_forward_ends_well(fetches: Fetches) -> None:
    source = Source(cut(100_001))
    assert await whole(fetches.start(source)) == DATA
    assert len(source.asked_from) == 15


@pytest.mark.parametrize(("transfer", "text"), [(broken, "it broke"), (cut(0), "ended after 0 of 1500000 bytes")])
async def test_one_that_does_not_come_forward_ends(
    fetches: Fetches, cache: DiskCache, transfer: Callable[[int], AsyncGenerator[bytes, None]], text: str
) -> None:
    source = Source(transfer)
    data, error = await as_far_as_it_came(fetches.start(source).read(ALL))
    assert data == b""
    assert isinstance(error, PeerUnavailable)
    assert text in str(error)
    assert len(source.asked_from) == 5
    await settled(fetches)
    assert await cache.used() == 0


@pytest.mark.parametrize("error", [PeerError("404"), StoreError("the bucket is gone")])
async def test_what_is_in_vain_is_not_tried_again(fetches: Fetches, error: Exception) -> None:
    source = Source(cut(1000, error))
    data, raised = await as_far_as_it_came(fetches.start(source).read(ALL))
    assert raised is error
    assert data == DATA[:1000]
    assert source.asked_from == [0]


async def test_who_comes_after_a_failure_begins_anew(fetches: Fetches) -> None:
    failing = Source(broken)
    first = fetches.start(failing)
    data, error = await as_far_as_it_came(first.read(ALL))
    assert (data, isinstance(error, PeerUnavailable)) == (b"", True)
    # also while somebody still follows the one that failed
    lagging = first.read(ALL)
    first._followers += 1
    second = fetches.start(Source())
    assert second is not first
    assert await whole(second) == DATA
    first._followers -= 1
    await lagging.aclose()


async def test_all_who_wait_are_told_of_a_failure(fetches: Fetches) -> None:
    gate = asyncio.Event()
    fetch = fetches.start(Source(held(gate, error=PeerError("it is not there"))))
    waiting = [asyncio.create_task(as_far_as_it_came(fetch.read(ByteRange(n, n + 10)))) for n in range(0, 1000, 100)]
    done = asyncio.create_task(fetch.done())
    await asyncio.sleep(0.01)
    gate.set()
    for data, error in await asyncio.gather(*waiting):
        assert (data, str(error)) == (b"", "it is not there")
    with pytest.raises(PeerError):
        await done


async def test_a_defect_ends_it_for_all(fetches: Fetches) -> None:
    fetch = fetches.start(Source(cut(0, ZeroDivisionError())))
    (task,) = fetches._tasks
    data, error = await as_far_as_it_came(fetch.read(ALL))
    assert (data, type(error).__name__) == (b"", "StoreUnavailable")
    await asyncio.wait([task])
    assert isinstance(task.exception(), ZeroDivisionError)
    assert fetches.under_way("main/nar/a") is None


async def test_a_client_that_goes_does_not_end_it(fetches: Fetches, cache: DiskCache) -> None:
    gate = asyncio.Event()
    source = Source(held(gate, 300_000))
    fetch = fetches.start(source)
    stays = asyncio.create_task(whole(fetch))
    goes = asyncio.create_task(whole(fetch))
    closes = fetch.read(ALL)
    await anext(closes)
    await closes.aclose()
    goes.cancel()
    await asyncio.wait([goes])
    gate.set()
    assert await stays == DATA
    await settled(fetches)
    assert await cache.get(source.key)


async def test_it_goes_on_when_all_have_gone(fetches: Fetches, cache: DiskCache) -> None:
    gate = asyncio.Event()
    source = Source(held(gate, 300_000))
    async with aclosing(fetches.start(source).read(ALL)) as chunks:
        await anext(chunks)
    gate.set()
    await settled(fetches)
    assert await cache.get(source.key)


async def test_a_slow_client_holds_up_nobody(fetches: Fetches, cache: DiskCache) -> None:
    """Neither the fetch, nor who comes later; it gets what it came for, even from a file that is evicted meanwhile."""
    source = Source()
    fetch = fetches.start(source)
    slow = fetch.read(ALL)
    data = await anext(slow)
    await asyncio.wait_for(fetch.done(), PLENTY)
    assert fetches.under_way(source.key) is None
    assert await cache.get(source.key)
    await cache.discard(source.key)
    async for chunk in slow:
        data += chunk
    assert data == DATA
    await settled(fetches)
    assert await cache.used() == 0


async def test_as_many_at_a_time_as_it_should_be(cache: DiskCache) -> None:
    fetches = Fetches(cache, parallel=1)
    gate = asyncio.Event()
    first, second = Source(held(gate, 1000)), Source()
    second.key = "main/nar/b"
    slow = fetches.start(first).read(ALL)
    await anext(slow)
    waits = asyncio.create_task(whole(fetches.start(second)))
    await asyncio.sleep(0.02)
    assert second.asked_from == []
    gate.set()
    # Who reads slowly does not take the turn of others.
    assert await asyncio.wait_for(waits, PLENTY) == DATA
    await slow.aclose()
    await fetches.close()


async def test_where_there_is_no_room_that_is_told_before_the_first_byte(fetches: Fetches, cache: DiskCache) -> None:
    fetch = fetches.start(Source(size=LIMIT + 1))
    with pytest.raises(StoreFull, match="larger than the disk cache"):
        await fetch.begun()
    full = Source()
    full.no_room = StoreFull("the store is full")
    fetch = fetches.start(full)
    with pytest.raises(StoreFull, match="the store is full"):
        await fetch.begun()
    assert full.asked_from == []
    fetch = fetches.start(Source())
    await fetch.begun()
    await fetch.done()


async def test_a_size_that_nobody_knows_is_known_in_the_end(fetches: Fetches, cache: DiskCache) -> None:
    source = Source(cut(1000, PeerUnavailable("reset")), good, size=None)
    fetch = fetches.start(source)
    assert fetch.size is None
    await fetch.done()
    found = await cache.get(source.key)
    assert found
    assert found.size == len(DATA)


async def test_what_cannot_be_stored_is_not_given_out_whole(fetches: Fetches) -> None:
    source = Source()
    source.refusal = StoreError("the bucket takes nothing")
    data, error = await as_far_as_it_came(fetches.start(source).read(ALL))
    assert len(data) < len(DATA)
    assert error is source.refusal


async def test_what_is_under_way_is_ended_at_the_end(cache: DiskCache) -> None:
    fetches = Fetches(cache, parallel=1)
    gate = asyncio.Event()
    running = asyncio.create_task(as_far_as_it_came(fetches.start(Source(held(gate, 1000))).read(ALL)))
    waiting = Source()
    waiting.key = "main/nar/b"
    queued = asyncio.create_task(as_far_as_it_came(fetches.start(waiting).read(ALL)))
    await asyncio.sleep(0.05)
    await fetches.close()
    for data, error in await asyncio.gather(running, queued):
        assert len(data) <= 1000
        assert isinstance(error, StoreError)
    assert await cache.used() == 0


@pytest.mark.parametrize(
    "part",
    [ALL, ByteRange(0, 1), ByteRange(1_200_000, len(DATA)), ByteRange(500_000, 500_010), ByteRange(1, len(DATA) - 1)],
)
async def test_alone_it_comes_at_the_pace_of_its_reader(part: ByteRange) -> None:
    source = Source(cut(123_456), good)
    assert b"".join([chunk async for chunk in read_alone(source, part)]) == DATA[part.start : part.end]


@pytest.mark.parametrize(("transfer", "kind"), [(altered, PeerError), (broken, PeerUnavailable)])
async def test_alone_too_what_is_wrong_never_arrives_whole(
    transfer: Callable[[int], AsyncGenerator[bytes, None]], kind: type[Exception]
) -> None:
    data, error = await as_far_as_it_came(read_alone(Source(transfer), ALL))
    assert isinstance(error, kind)
    assert len(data) < len(DATA)


async def test_alone_nothing_is_read_ahead_for_long_and_all_ends_with_the_reader() -> None:
    large = bytes(2**20)
    sent = 0
    ended = asyncio.Event()

    async def endless(_start: int) -> AsyncGenerator[bytes, None]:
        nonlocal sent
        try:
            while True:
                sent += len(large)
                yield large
        finally:
            ended.set()

    chunks = read_alone(Source(endless, size=2**40), ByteRange(0, 2**40))
    await anext(chunks)
    await asyncio.sleep(0.05)
    assert sent < 2**23
    await chunks.aclose()
    assert ended.is_set()
