"""Large NARs in parts: resumed where they were, in bounded memory, whatever breaks."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import zstandard

from cachesrv.errors import ServerError
from cachesrv.nix.nar_writer import dump
from cachesrv.push import events, in_parts
from cachesrv.push.address import Address
from cachesrv.push.frame import FRAME_SIZE, recipe
from cachesrv.push.in_parts import part_memory
from cachesrv.push.level import DEFAULT_LEVEL, Level
from cachesrv.push.memory import Shares
from cachesrv.push.nar_upload import upload_name
from cachesrv.push.part_memory import PartMemory
from cachesrv.push.retry import Backoff
from cachesrv.push.run import Options, push
from cachesrv.push.settings import Settings
from cachesrv.push.token import TokenVariable
from tests.push_doubles import HURRY, PLENTY, FakeCache, TemporaryStore, answer, drop, hang, path_info, store_path

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aiohttp import web

    from cachesrv.push.connection import Timeouts
    from cachesrv.push.part_memory import Share
    from tests.push_doubles import Handler

MIB = 2**20
QUICK = Options(backoff=Backoff(attempts=3, first=0.01))
LARGE = random.Random(5).randbytes(7 * MIB)

pytestmark = pytest.mark.usefixtures("no_pauses")


@pytest.fixture
def store(store: TemporaryStore) -> TemporaryStore:
    store.add("large", LARGE)
    return store


@pytest.fixture
async def cache() -> AsyncIterator[FakeCache]:
    async with FakeCache(part_size=MIB) as running:
        yield running


async def pushed(
    store: TemporaryStore,
    cache: FakeCache,
    *names: str,
    told: list[events.Event] | None = None,
    level: Level | None = None,
    timeouts: Timeouts = PLENTY,
) -> events.Summary:
    """What becomes of paths, by default of the large one."""
    settings = Settings(Address.parse(cache.url), TokenVariable.of("CACHESRV_TOKEN", "secret"))
    paths = [store_path(name).full("/nix/store") for name in names or ["large"]]
    options = replace(QUICK, level=level, timeouts=timeouts)
    return await push(paths, store, settings, options, (told if told is not None else []).append)


def arrived(store: TemporaryStore, cache: FakeCache, name: str = "large") -> bool:
    """Whether its NAR is at the cache, byte for byte."""
    file = cache.nars.get(store.infos[store_path(name)].nar_hash.nix32, b"")
    if not file:
        return False
    nar = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress(file)
    return nar == b"".join(dump(store.file(name)))


async def test_a_large_nar_goes_in_parts(store: TemporaryStore, cache: FakeCache) -> None:
    store.add("small", b"small")
    told: list[events.Event] = []
    summary = await pushed(store, cache, "large", "small", told=told)

    assert arrived(store, cache)
    assert arrived(store, cache, "small")
    assert (summary.uploaded, summary.resumed_bytes) == (2, 0)
    assert summary.sent_bytes == sum(map(len, cache.nars.values()))
    assert (cache.count("begin"), cache.count("part"), cache.count("complete"), cache.count("nar")) == (1, 8, 1, 1)
    sent = [event for event in told if isinstance(event, events.Sent) and event.path.endswith("-large")]
    assert sum(event.nar_bytes for event in sent) == store.infos[store_path("large")].nar_size


async def test_what_becomes_small_goes_in_one_piece(store: TemporaryStore, cache: FakeCache) -> None:
    store.add("empty", bytes(5 * MIB))
    told: list[events.Event] = []
    summary = await pushed(store, cache, "empty", told=told)

    assert arrived(store, cache, "empty")
    assert (cache.count("begin"), cache.count("nar")) == (0, 1)
    assert sum(event.nar_bytes for event in told if isinstance(event, events.Sent)) == summary.nar_bytes


async def test_a_server_that_takes_no_parts_gets_none(store: TemporaryStore) -> None:
    async with FakeCache() as old:
        await pushed(store, old)
        assert arrived(store, old)
        assert (old.count("begin"), old.count("nar")) == (0, 1)


async def test_an_interrupted_push_goes_on_where_it_was(store: TemporaryStore, cache: FakeCache) -> None:
    reached = asyncio.Event()

    async def stop(request: web.Request) -> web.StreamResponse:
        reached.set()
        return await hang(request)

    async def pass_on(request: web.Request) -> web.StreamResponse:
        return await cache._part(request)

    cache.fail("part", pass_on, pass_on, pass_on, pass_on, stop)
    pushing = asyncio.create_task(pushed(store, cache))
    await asyncio.wait_for(reached.wait(), 30)
    pushing.cancel()
    await asyncio.gather(pushing, return_exceptions=True)
    (there,) = cache.uploads.values()
    before, size = len(there), sum(map(len, there.values()))
    assert before >= 2
    cache.requests.clear()
    cache.faults.clear()
    told: list[events.Event] = []

    summary = await pushed(store, cache, told=told)

    assert arrived(store, cache)
    assert cache.count("part") == 8 - before
    assert summary.resumed_bytes == size
    assert summary.sent_bytes == len(next(iter(cache.nars.values()))) - size
    assert [event for event in told if isinstance(event, events.Resumed)] == [
        events.Resumed(store_path("large").base_name, size, before, 8)
    ]


async def test_what_is_resumed_is_verified(store: TemporaryStore, cache: FakeCache) -> None:
    """A part that is there and is not ours is sent again."""
    info = store.infos[store_path("large")]
    cache.uploads[upload_name(info.nar_hash, recipe(DEFAULT_LEVEL), MIB)] = {1: b"of somebody else"}
    summary = await pushed(store, cache)

    assert arrived(store, cache)
    assert cache.count("part") == 8
    assert summary.resumed_bytes == 0


async def test_a_nar_is_taken_up_with_the_level_that_it_was_begun_with(store: TemporaryStore, cache: FakeCache) -> None:
    """By one who would choose another; by one who states another it is not."""
    await pushed(store, cache, level=7)
    (name,) = cache.uploads
    del cache.uploads[name][3]
    expected: list[tuple[Level, int, int]] = [(5, 5, 8), ("auto", 7, 1)]
    for level, used, parts in expected:
        cache.nars.clear()
        cache.published.clear()
        cache.requests.clear()
        cache.uploads = {name: cache.uploads[name]}
        told: list[events.Event] = []
        summary = await pushed(store, cache, told=told, level=level)

        assert arrived(store, cache)
        assert [event.level for event in told if isinstance(event, events.Stored)] == [used]
        assert cache.count("part") == parts
        assert (summary.resumed_bytes > 6 * MIB) == (used == 7)
        assert cache.count("begun") == (1 if level == "auto" else 0)


@pytest.mark.parametrize("status", [404, 405])
async def test_a_server_that_does_not_say_what_was_begun(store: TemporaryStore, cache: FakeCache, status: int) -> None:
    cache.fail("begun", answer(status))
    told: list[events.Event] = []
    await pushed(store, cache, told=told, level="auto")

    assert arrived(store, cache)
    assert [event.level for event in told if isinstance(event, events.Stored)] == [DEFAULT_LEVEL]


@pytest.mark.parametrize(
    "fault", [drop, answer(503), answer(429, Retry_After="0"), hang], ids=["drop", "503", "429", "hang"]
)
async def test_one_part_is_sent_again_and_no_other(store: TemporaryStore, cache: FakeCache, fault: Handler) -> None:
    cache.fail("part", fault)
    summary = await pushed(store, cache, timeouts=HURRY if fault is hang else PLENTY)

    assert arrived(store, cache)
    assert summary.failed == 0
    assert cache.count("part") == 8 + 1
    assert cache.count("begin") == 1


@pytest.mark.parametrize("route", ["begin", "complete"])
@pytest.mark.parametrize("fault", [drop, answer(503)], ids=["drop", "503"])
async def test_questions_are_asked_again(store: TemporaryStore, cache: FakeCache, route: str, fault: Handler) -> None:
    cache.fail(route, fault)
    await pushed(store, cache)

    assert arrived(store, cache)
    assert cache.count("part") == 8


async def test_who_is_interrupted_while_the_server_checks_asks_again(store: TemporaryStore, cache: FakeCache) -> None:
    cache.slow = 3
    await pushed(store, cache)

    assert arrived(store, cache)
    assert cache.count("complete") == 4


async def test_a_server_that_does_not_come_to_an_end_is_given_up(store: TemporaryStore, cache: FakeCache) -> None:
    cache.slow = 10**9
    told: list[events.Event] = []
    summary = await pushed(store, cache, told=told, timeouts=HURRY)

    assert summary.failed == 1
    assert cache.count("part") == 8
    (failed,) = [event for event in told if isinstance(event, events.Failed)]
    assert "does not come to an end" in failed.error


async def test_parts_that_are_gone_are_sent_again(store: TemporaryStore, cache: FakeCache) -> None:
    async def forget_some(request: web.Request) -> web.StreamResponse:
        (there,) = cache.uploads.values()
        del there[3], there[5]
        return await cache._complete(request)

    cache.fail("complete", forget_some)
    summary = await pushed(store, cache)

    assert arrived(store, cache)
    assert cache.count("part") == 8 + 2
    assert summary.failed == 0


async def test_an_upload_that_is_gone_is_begun_anew(store: TemporaryStore, cache: FakeCache) -> None:
    async def forget(request: web.Request) -> web.StreamResponse:
        cache.uploads.clear()
        return await cache._part(request)

    cache.fail("part", forget)
    await pushed(store, cache)

    assert arrived(store, cache)
    assert cache.count("begin") == 2


async def test_a_nar_that_somebody_else_has_sent_meanwhile_needs_no_more(
    store: TemporaryStore, cache: FakeCache
) -> None:
    info = store.infos[store_path("large")]

    async def be_slower(request: web.Request) -> web.StreamResponse:
        cache.uploads.clear()
        cache.nars[info.nar_hash.nix32] = b"there"
        return await cache._part(request)

    cache.fail("part", be_slower)
    summary = await pushed(store, cache)

    assert (summary.uploaded, summary.failed) == (1, 0)
    assert cache.nars[info.nar_hash.nix32] == b"there"


async def test_a_nar_that_is_there_at_the_beginning_needs_nothing(store: TemporaryStore, cache: FakeCache) -> None:
    info = store.infos[store_path("large")]

    async def be_slower(request: web.Request) -> web.StreamResponse:
        cache.nars[info.nar_hash.nix32] = b"there"
        return await cache._begin(request)

    cache.fail("begin", be_slower)
    summary = await pushed(store, cache)

    assert (summary.uploaded, summary.sent_bytes) == (1, 0)
    assert cache.count("part") == 0


async def test_a_damaged_path_leaves_no_parts(store: TemporaryStore, cache: FakeCache) -> None:
    store.file("large").write_bytes(LARGE[:-1] + b"x")
    store.add("good", b"good")
    summary = await pushed(store, cache, "large", "good")

    assert (summary.uploaded, summary.failed) == (1, 1)
    assert cache.uploads == {}
    assert not arrived(store, cache)


async def test_a_part_that_the_server_refuses_is_the_end_of_its_path(store: TemporaryStore, cache: FakeCache) -> None:
    store.add("good", b"good")
    cache.fail("part", answer(422))
    summary = await pushed(store, cache, "large", "good")

    assert (summary.uploaded, summary.failed) == (1, 1)


async def test_what_does_not_pass_is_not_tried_for_ever(store: TemporaryStore, cache: FakeCache) -> None:
    cache.fail("part", *[answer(503)] * 100)
    summary = await pushed(store, cache)

    assert summary.failed == 1
    assert cache.count("part") <= 3 * in_parts.part_memory(64 * MIB).count
    assert cache.count("begin") == 1


async def test_a_server_without_room_ends_the_push(store: TemporaryStore, cache: FakeCache) -> None:
    cache.fail("part", answer(507, "no room"))
    with pytest.raises(ServerError, match="takes no more"):
        await pushed(store, cache)


async def test_many_large_nars_share_the_memory(tmp_path: Path, cache: FakeCache) -> None:
    """More than there is memory for, with frames of some waiting for what others hold."""
    store = TemporaryStore(tmp_path / "many")
    store.directory.mkdir()
    names = [f"large-{number}" for number in range(6)]
    for number, name in enumerate(names):
        store.add(name, random.Random(number).randbytes(3 * MIB))
    settings = Settings(Address.parse(cache.url), TokenVariable.of("CACHESRV_TOKEN", "secret"))
    paths = [store_path(name).full("/nix/store") for name in names]

    async with asyncio.timeout(60):
        summary = await push(paths, store, settings, replace(QUICK, memory=16 * MIB))

    assert summary.uploaded == len(names)
    assert all(arrived(store, cache, name) for name in names)


@pytest.mark.parametrize("changed", ["nar", "recipe", "size"])
def test_uploads_are_called_by_all_that_their_bytes_depend_on(changed: str) -> None:
    one, other = path_info("one").nar_hash, path_info("other").nar_hash
    name = upload_name(one, "zstd 1.5.5, level 3", MIB)

    assert name == upload_name(one, "zstd 1.5.5, level 3", MIB)
    assert name != upload_name(
        other if changed == "nar" else one,
        "zstd 1.5.5, level 4" if changed == "recipe" else "zstd 1.5.5, level 3",
        2 * MIB if changed == "size" else MIB,
    )


def test_the_memory_for_parts_fits_what_there_is() -> None:
    for memory in (16, 32, 64, 128, 256, 1024):
        shares = Shares.of(memory * MIB, frame_size=FRAME_SIZE, level=3, cores=2, jobs=8)
        parts = part_memory(shares.parts)
        assert MIB <= parts.size <= 8 * MIB
        assert parts.size * parts.count <= max(shares.parts, MIB)
    assert part_memory(100 * MIB).size == 8 * MIB
    for cores in (1, 2, 8, 64):
        by_default = Shares.of(None, frame_size=FRAME_SIZE, level=3, cores=cores, jobs=8)
        assert part_memory(by_default.parts).count >= 3


async def test_every_share_is_sure_of_two_buffers() -> None:
    """Also of a memory that a share that was alone had taken all of."""
    memory = PartMemory(10, 5)
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(memory.share())
        taken = [await first.take() for _ in range(5)]
        second = await stack.enter_async_context(memory.share())
        waiting = asyncio.create_task(second.take())
        more = asyncio.create_task(first.take())
        await _turns()
        assert not waiting.done()

        first.give(taken.pop())
        await _turns()
        assert waiting.done()
        assert not more.done()
        first.give(taken.pop())
        assert await second.take() is not None
        first.give(taken.pop())
        await more
        third = asyncio.create_task(second.take())
        await _turns()
        assert not third.done()
        second.give(waiting.result())
        await third
        assert _out(first, second) == 5

        late = asyncio.create_task(stack.enter_async_context(memory.share()))
        await _turns()
        assert not late.done()
        late.cancel()
    assert _out(first, second) == 0
    async with memory.share() as again:
        assert len([await again.take() for _ in range(5)]) == 5


async def test_who_waits_in_vain_holds_nothing() -> None:
    memory = PartMemory(10, 2)
    async with memory.share() as share:
        one, _ = await share.take(), await share.take()
        waiting = asyncio.create_task(share.take())
        await _turns()
        share.give(one)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert _out(share) == 1


async def test_nars_of_one_part_are_sure_of_one_buffer() -> None:
    """So more of them have a share; and who needs two has its turn before those that came later."""
    memory = PartMemory(10, 4)
    async with AsyncExitStack() as stack:
        small = [await stack.enter_async_context(memory.share(1)) for _ in range(3)]
        large = asyncio.create_task(_shared(stack, memory, 2))
        late = asyncio.create_task(_shared(stack, memory, 1))
        await _turns()
        assert not large.done()
        assert not late.done()

        small[0].leave()
        assert len([await (await large).take() for _ in range(2)]) == 2
        assert len([await share.take() for share in small[1:]]) == 2
        await _turns()
        assert not late.done()
        small[1].leave()
        assert await (await late).take() is not None


async def _shared(stack: AsyncExitStack, memory: PartMemory, parts: int) -> Share:
    return await stack.enter_async_context(memory.share(parts))


async def test_who_does_not_wait_for_a_share_any_more_is_in_nobodys_way() -> None:
    memory = PartMemory(10, 2)
    async with memory.share(), AsyncExitStack() as stack:
        given_up = asyncio.create_task(_shared(stack, memory, 2))
        waiting = asyncio.create_task(_shared(stack, memory, 1))
        await _turns()
        given_up.cancel()
        await asyncio.wait([given_up])
        assert not waiting.done()
    async with stack:
        assert await (await waiting).take() is not None


async def test_a_single_buffer_is_enough() -> None:
    memory = PartMemory(10, 1)
    async with memory.share() as share:
        buffer = await share.take()
        waiting = asyncio.create_task(share.take())
        await _turns()
        assert not waiting.done()
        share.give(buffer)
        assert await waiting is buffer


def _out(*shares: Share) -> int:
    return sum(len(share.out) for share in shares)


async def _turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)
