"""Small NARs are sent in packs, and everything else is as it was."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import pytest
import zstandard

from cachesrv import pack
from cachesrv.errors import ServerError
from cachesrv.nix.nar_writer import dump
from cachesrv.push import events
from cachesrv.push.address import Address
from cachesrv.push.packing import Packing
from cachesrv.push.pipeline import Pipeline
from cachesrv.push.plan import Nar
from cachesrv.push.retry import Backoff
from cachesrv.push.run import Options, push
from cachesrv.push.server import connect
from cachesrv.push.settings import Settings
from cachesrv.push.token import TokenVariable
from tests.push_doubles import HURRY, PLENTY, FakeCache, TemporaryStore, answer, drop, hang, path_info, store_path

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterable
    from pathlib import Path
    from typing import Any

    from aiohttp import web

    from cachesrv.api import PackLimits
    from cachesrv.nix.path_info import PathInfo
    from cachesrv.nix.store_path import StorePath
    from cachesrv.push.nar_source import NarSource
    from tests.push_doubles import Handler

QUICK = Options(backoff=Backoff(attempts=3, first=0.01), timeouts=PLENTY)
NUMBER = 40


@pytest.fixture
def store(store: TemporaryStore) -> TemporaryStore:
    """Small paths in a chain, each referring to two before it, and a large one in their midst."""
    for number in range(NUMBER):
        names = [f"small-{other}" for other in (number - 1, number - 7) if other >= 0]
        if number > NUMBER // 2:
            names.append("large")
        store.add(f"small-{number}", b"%d" % number, names)
        if number == NUMBER // 2:
            store.add("large", bytes(3 * 2**20), ["small-1"])
    return store


@pytest.fixture
async def cache() -> AsyncIterator[FakeCache]:
    async with FakeCache(packs=pack.LIMITS) as running:
        yield running


def limited(**limits: Any) -> PackLimits:
    return msgspec.structs.replace(pack.LIMITS, **limits)


async def pushed(
    store: TemporaryStore, cache: FakeCache, *names: str, told: list[events.Event] | None = None, **options: Any
) -> events.Summary:
    settings = Settings(Address.parse(cache.url), TokenVariable.of("CACHESRV_TOKEN", "secret"))
    paths = [store_path(name).full("/nix/store") for name in names or (f"small-{NUMBER - 1}",)]
    emit = (told if told is not None else []).append
    return await push(paths, store, settings, replace(QUICK, **options), emit)


def check_all_there(store: TemporaryStore, cache: FakeCache, but: Iterable[str] = ()) -> None:
    expected = {path.base_name for path in store.infos} - {store_path(name).base_name for name in but}
    assert cache.published.keys() == expected
    decompressor = zstandard.ZstdDecompressor()
    for info in store.infos.values():
        if info.store_path.base_name in expected:
            nar = b"".join(dump(store.directory / info.store_path.base_name))
            file = cache.nars[info.nar_hash.nix32]
            assert decompressor.decompressobj(read_across_frames=True).decompress(file) == nar


async def test_small_ones_go_together_and_large_ones_by_themselves(store: TemporaryStore, cache: FakeCache) -> None:
    summary = await pushed(store, cache)

    check_all_there(store, cache)
    assert (summary.uploaded, summary.failed) == (NUMBER + 1, 0)
    assert summary.sent_bytes == sum(map(len, cache.nars.values()))
    assert summary.nar_bytes == sum(info.nar_size for info in store.infos.values())
    assert cache.count("pack") == 1
    assert cache.count("nar") == 1
    assert cache.count("paths") <= 1
    order = [name for batch in cache.batches for name in batch]
    assert len(order) == len(set(order)), "nothing is published twice"


async def test_a_closure_of_small_paths_is_one_request(store: TemporaryStore, cache: FakeCache) -> None:
    await pushed(store, cache, f"small-{NUMBER // 2}")

    assert cache.requests == ["cache", "missing", "pack"]


@pytest.mark.parametrize("jobs", [1, 8])
@pytest.mark.parametrize(
    "limits", [limited(nars=1), limited(nars=3), limited(size=1000), limited(nar_size=200)], ids=["1", "3", "B", "none"]
)
async def test_packs_keep_to_their_limits(
    store: TemporaryStore, cache: FakeCache, limits: PackLimits, jobs: int
) -> None:
    """Whatever pack a path is in, it is published after all that it refers to."""
    cache.packs = limits
    summary = await pushed(store, cache, jobs=jobs)

    check_all_there(store, cache)
    assert summary.failed == 0
    assert len(cache.batches) < NUMBER * 2


async def test_events_of_each_path_are_as_ever(store: TemporaryStore, cache: FakeCache) -> None:
    told: list[events.Event] = []
    await pushed(store, cache, told=told)

    for path in store.infos:
        of_path = [type(one) for one in told if getattr(one, "path", "") == path.base_name]
        assert list(dict.fromkeys(of_path)) == [
            events.Planned,
            events.Sending,
            events.Sent,
            events.Stored,
            events.Published,
        ]


async def test_a_server_without_packs(store: TemporaryStore, cache: FakeCache) -> None:
    cache.packs = None
    await pushed(store, cache)

    check_all_there(store, cache)
    assert cache.count("pack") == 0


async def test_a_damaged_path_and_what_needs_it_fail_and_nothing_else(store: TemporaryStore, cache: FakeCache) -> None:
    store.file("small-30").write_bytes(b"xx")
    store.add("other", b"other")
    summary = await pushed(store, cache, f"small-{NUMBER - 1}", "other")

    check_all_there(store, cache, but=[f"small-{number}" for number in range(30, NUMBER)])
    assert summary.failed == NUMBER - 30


@pytest.mark.parametrize("change", [b"1", b"longer than it was", None])
async def test_an_intact_twin_stands_in_for_a_damaged_path(
    store: TemporaryStore, cache: FakeCache, change: bytes | None
) -> None:
    first, second = sorted(("one", "two"), key=store_path)
    for name in (first, second):
        store.add(name, b"twin")
    if change is None:
        store.file(first).unlink()
    else:
        store.file(first).write_bytes(change)
    summary = await pushed(store, cache, "one", "two")

    assert summary.failed == 1
    assert cache.published.keys() == {store_path(second).base_name}


async def test_equal_nars_are_sent_once(store: TemporaryStore, cache: FakeCache) -> None:
    for name in ("one", "two", "three"):
        store.add(name, b"equal")
    told: list[events.Event] = []

    assert (await pushed(store, cache, "one", "two", "three", told=told)).uploaded == 3
    assert cache.requests == ["cache", "missing", "pack"]
    assert sum(isinstance(one, events.Stored) for one in told) == 1


async def test_a_nar_that_is_refused_is_sent_by_itself(store: TemporaryStore, cache: FakeCache) -> None:
    cache.unpackable = {store.infos[store_path(name)].nar_hash.nix32 for name in ("small-3", "small-20")}
    summary = await pushed(store, cache)

    check_all_there(store, cache)
    assert summary.failed == 0
    assert cache.count("nar") == 3


async def test_a_nar_that_is_refused_in_every_way_fails_its_path(store: TemporaryStore, cache: FakeCache) -> None:
    cache.unpackable = {store.infos[store_path("small-20")].nar_hash.nix32}
    cache.fail("nar", answer(422, "bad NAR"))
    summary = await pushed(store, cache, "small-20")

    assert summary.failed == 1
    check_all_there(store, cache, but=["large", *(f"small-{number}" for number in range(20, NUMBER))])


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_server_that_takes_no_pack_after_all(store: TemporaryStore, cache: FakeCache, status: int) -> None:
    """Or a proxy before it, to which the body is too large."""
    cache.packs = limited(nars=5)
    cache.fail("pack", *[answer(status, "no packs here")] * 2)
    summary = await pushed(store, cache)

    check_all_there(store, cache)
    assert summary.failed == 0
    assert cache.count("pack") <= 2


@pytest.mark.parametrize("fault", [drop, answer(503), hang], ids=["drop", "503", "hang"])
async def test_what_passes_is_tried_again(store: TemporaryStore, cache: FakeCache, fault: Handler) -> None:
    cache.fail("pack", fault)
    told: list[events.Event] = []
    summary = await pushed(store, cache, told=told, timeouts=HURRY if fault is hang else PLENTY)

    check_all_there(store, cache)
    assert summary.failed == 0
    (retrying,) = (one for one in told if isinstance(one, events.Retrying))
    assert "40 small NARs" in retrying.what


async def test_a_pack_that_never_gets_through_fails_its_paths(store: TemporaryStore, cache: FakeCache) -> None:
    cache.fail("pack", *[answer(503)] * 3)
    store.add("big", bytes(3 * 2**20))
    summary = await pushed(store, cache, "small-5", "big")

    assert (summary.failed, summary.uploaded) == (6, 1)


async def test_nars_that_the_server_lost_are_sent_again(store: TemporaryStore, cache: FakeCache) -> None:
    lost = store.infos[store_path("small-0")].nar_hash.nix32
    cache.nars[lost] = b"stored"
    cache.packs = limited(nars=1)
    cache.fail("pack", _forgetting(cache, lost))
    summary = await pushed(store, cache)

    check_all_there(store, cache)
    assert summary.failed == 0


def _forgetting(cache: FakeCache, nar_hash: str) -> Handler:
    async def handle(request: Any) -> Any:
        cache.nars.pop(nar_hash, None)
        return await cache._pack(request)

    return handle


async def test_a_path_that_cannot_be_read_comes_from_the_daemon(store: TemporaryStore, cache: FakeCache) -> None:
    store.unreadable.add(store_path("small-3"))
    await pushed(store, cache)

    check_all_there(store, cache)
    assert (cache.count("pack"), cache.count("nar")) == (1, 1)


class DaemonsStore(TemporaryStore):
    """Of which nothing can be read but through a daemon, that takes `connections` at a time; `most` have been open."""

    connections = 4

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.most = 0
        self._pool = asyncio.Semaphore(self.connections)
        self._open = 0

    def real_path(self, path: StorePath) -> str | None:
        return None

    async def nar(self, info: PathInfo) -> AsyncGenerator[bytes, None]:
        async with self._pool, aclosing(super().nar(info)) as chunks:
            self._open += 1
            self.most = max(self.most, self._open)
            try:
                async for chunk in chunks:
                    yield chunk
            finally:
                self._open -= 1


@pytest.fixture
def daemons(store: TemporaryStore) -> DaemonsStore:
    daemons = DaemonsStore(store.directory)
    daemons.infos = store.infos
    return daemons


async def test_nars_come_through_the_daemon_several_at_a_time(daemons: DaemonsStore, cache: FakeCache) -> None:
    summary = await pushed(daemons, cache)

    check_all_there(daemons, cache)
    assert (summary.uploaded, summary.failed) == (NUMBER + 1, 0)
    assert daemons.most == daemons.connections
    assert (cache.count("pack"), cache.count("nar")) == (1, 1)


@pytest.mark.parametrize("memory", [8, 64])
async def test_who_waits_for_the_daemon_does_not_wait_for_ever(
    daemons: DaemonsStore, cache: FakeCache, memory: int
) -> None:
    """Those who have its connections may be waiting for memory."""
    names = [f"middling-{number}" for number in range(30)]
    for number, name in enumerate(names):
        daemons.add(name, random.Random(number).randbytes((200 << 10) if number % 5 else 3 << 20))
    async with asyncio.timeout(60):
        summary = await pushed(daemons, cache, *names, memory=memory << 20)

    assert (summary.uploaded, summary.failed) == (30, 0)


async def test_what_a_daemon_gives_is_checked(daemons: DaemonsStore, cache: FakeCache) -> None:
    for name, length in (("small-5", 1), ("small-6", 100)):
        daemons.file(name).write_bytes(bytes(length))
    told: list[events.Event] = []
    summary = await pushed(daemons, cache, "small-4", "small-5", "small-6", told=told)

    assert (summary.uploaded, summary.failed) == (5, 2)
    kinds = {event.path[-7:]: event.kind for event in told if isinstance(event, events.Failed)}
    assert kinds["small-5"] == "damaged"


async def test_more_references_than_a_head_can_hold(store: TemporaryStore, cache: FakeCache) -> None:
    cache.packs = limited(head_size=9000)
    summary = await pushed(store, cache)

    check_all_there(store, cache)
    assert summary.failed == 0
    assert cache.count("paths") >= 1


async def test_answers_for_others_are_noticed(store: TemporaryStore, cache: FakeCache) -> None:
    cache.fail("pack", answer(200, '{"nars":[],"paths":[]}'))
    with pytest.raises(ServerError, match="other NARs"):
        await pushed(store, cache)


@asynccontextmanager
async def making(cache: FakeCache, limits: PackLimits) -> AsyncIterator[tuple[Packing, Pipeline]]:
    """Packs of NARs that nobody reads."""

    def never(info: PathInfo) -> NarSource:
        raise AssertionError(info)

    with Pipeline() as pipeline:
        async with connect(Address.parse(cache.url), TokenVariable.of("CACHESRV_TOKEN", "secret")) as server:
            yield Packing(server, pipeline, never, limits, emit=events.ignore), pipeline


async def test_groups(cache: FakeCache) -> None:
    sizes = [10, 1000, 1001, 0, 10, 10, 980, 1, 1, 1, 1, 500]
    nars = [Nar(path_info(f"n{number}").nar_hash, size, ()) for number, size in enumerate(sizes)]
    async with making(cache, limited(nars=3, size=2000)) as (packing, _):
        groups = [[nar.size for nar in group] for group in packing.groups(nars)]
    assert groups == [[10], [1000], [10, 10, 980], [1, 1, 1], [1, 500]]


async def test_memory_is_given_back(cache: FakeCache) -> None:
    nar = Nar(path_info("n").nar_hash, 1000, ())
    async with making(cache, pack.LIMITS) as (packing, pipeline):
        free = pipeline.budget.free
        async with packing.packed([nar]) as made:
            assert pipeline.budget.free == free - 1000
            assert made.ready == []
        assert pipeline.budget.free == free
        with pytest.raises(asyncio.CancelledError):
            async with packing.packed([nar]):
                raise asyncio.CancelledError
        assert pipeline.budget.free == free


async def test_a_lost_nar_does_not_wait_for_memory_of_the_pack_that_told_of_it(
    tmp_path: Path, cache: FakeCache
) -> None:
    """There is memory for one of the two."""
    store = TemporaryStore(tmp_path)
    lost = store.add("lost", b"lost").nar_hash.nix32
    store.add("other", b"other" * 1000)
    cache.nars[lost] = b"as it seems"

    async def lose(request: web.Request) -> web.Response:
        cache.nars.pop(lost)
        return await cache._pack(request)

    cache.fail("pack", lose)
    async with asyncio.timeout(30):
        summary = await pushed(store, cache, "other", "lost", memory=1)

    assert (summary.uploaded, summary.failed) == (2, 0)
    assert cache.batches[0] == sorted(path.base_name for path in store.infos)
    check_all_there(store, cache)
