"""Proxies that do not say what they want: they end connections, or do not look at them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from cachesrv.api import PackLimits
from cachesrv.push.address import Address
from cachesrv.push.connection import Timeouts
from cachesrv.push.events import Failed, Noted, Retrying
from cachesrv.push.retry import Backoff, Unreachable
from cachesrv.push.run import Options, push
from cachesrv.push.settings import Settings
from cachesrv.push.token import TokenVariable
from tests.push_doubles import FakeCache, TemporaryStore, answer, drop, store_path
from tests.tcp_proxy import End, TcpProxy

if TYPE_CHECKING:
    from cachesrv.push.events import Event, Summary

KIB, MIB = 2**10, 2**20
PACKS = PackLimits(nars=500, size=8 * MIB, nar_size=MIB, head_size=MIB)
TOKEN = TokenVariable.of("CACHESRV_TOKEN", "secret")
QUICK = Options(backoff=Backoff(first=0.02))

pytestmark = pytest.mark.usefixtures("no_pauses")


def port(cache: FakeCache) -> int:
    return int(cache.url.removesuffix("/main").rpartition(":")[2])


async def pushed(
    store: TemporaryStore, proxy: TcpProxy, names: list[str], told: list[Event], options: Options = QUICK
) -> Summary:
    settings = Settings(Address.parse(f"http://127.0.0.1:{proxy.port}/main"), TOKEN)
    paths = [store_path(name).full("/nix/store") for name in names]
    return await push(paths, store, settings, options, told.append)


def noted(told: list[Event]) -> list[str]:
    return [event.text for event in told if isinstance(event, Noted)]


def fill(store: TemporaryStore, *sizes: int) -> list[str]:
    for number, size in enumerate(sizes):
        store.add(f"file-{number}", random.Random(number).randbytes(size))
    return [f"file-{number}" for number in range(len(sizes))]


@pytest.mark.parametrize("end", End, ids=lambda end: end.value)
async def test_who_ends_connections_gets_smaller_bodies(store: TemporaryStore, end: End) -> None:
    names = fill(store, 12 * MIB, 3 * MIB, *[100 * KIB] * 30)
    told: list[Event] = []
    async with (
        FakeCache(part_size=32 * MIB, packs=PACKS) as cache,
        TcpProxy(port(cache), takes=MIB + 4 * KIB, end=end).running() as proxy,
    ):
        summary = await pushed(store, proxy, names, told)

    assert (summary.uploaded, summary.failed) == (len(names), 0)
    assert noted(told)[-1].endswith(f": bodies of at most {MIB} bytes are sent")
    assert proxy.ended < 40


async def test_who_gives_requests_little_time_gets_smaller_ones(store: TemporaryStore) -> None:
    """Fewer of them at once are not enough here."""
    names = fill(store, 20 * MIB)
    told: list[Event] = []
    async with (
        FakeCache(part_size=32 * MIB, packs=PACKS) as cache,
        TcpProxy(port(cache), in_time=3 * MIB).running() as proxy,
    ):
        summary = await pushed(store, proxy, names, told)

    assert (summary.uploaded, summary.failed) == (1, 0)
    assert "as if a proxy before it took less" in noted(told)[-1]


@pytest.mark.parametrize("status", [408, 504, 524])
async def test_who_says_that_it_took_too_long_gets_smaller_ones(store: TemporaryStore, status: int) -> None:
    names = fill(store, 6 * MIB)
    told: list[Event] = []
    async with FakeCache(part_size=32 * MIB) as cache, TcpProxy(port(cache)).running() as proxy:
        cache.fail("nar", *[answer(status)] * 3)
        summary = await pushed(store, proxy, names, told)

    assert (summary.uploaded, cache.count("complete")) == (1, 1)
    assert len(noted(told)) == 1


async def test_a_network_that_fails_changes_nothing(store: TemporaryStore) -> None:
    """As large ones have got through before."""
    names = fill(store, 20 * MIB)
    told: list[Event] = []
    async with FakeCache(part_size=MIB) as cache, TcpProxy(port(cache)).running() as proxy:
        cache.fail("part", cache._part, *[drop] * 7)
        summary = await pushed(store, proxy, names, told)

    assert (summary.uploaded, noted(told)) == (1, [])


async def test_a_server_that_is_not_there_either_has_no_limit(store: TemporaryStore) -> None:
    names = fill(store, 6 * MIB)
    told: list[Event] = []
    async with FakeCache(part_size=MIB) as cache, TcpProxy(port(cache)).running() as proxy:
        cache.fail("cache", cache._cache, *[answer(503)] * 100)
        cache.fail("part", *[drop] * 100)
        with pytest.raises(Unreachable, match="503"):
            await pushed(store, proxy, names, told)

    assert noted(told) == []


async def test_damaged_paths_are_no_sign_of_a_limit(store: TemporaryStore) -> None:
    """Their requests are cut short by us."""
    names = fill(store, *[MIB] * 6)
    for name in names[:5]:
        store.file(name).write_bytes(bytes(MIB))
    told: list[Event] = []
    async with FakeCache(part_size=32 * MIB) as cache, TcpProxy(port(cache)).running() as proxy:
        summary = await pushed(store, proxy, names, told)

    assert (summary.uploaded, summary.failed, noted(told)) == (1, 5, [])
    assert {event.kind for event in told if isinstance(event, Failed)} == {"damaged"}


async def test_who_wants_lengths_gets_them(store: TemporaryStore) -> None:
    """As proxies that do not know chunks; the packs say theirs anyway."""
    names = fill(store, 6 * MIB, 3 * MIB, 100)
    async with FakeCache(part_size=32 * MIB, packs=PACKS) as cache, TcpProxy(port(cache)).running() as proxy:
        cache.fail("nar", *[answer(411)] * 2)
        summary = await pushed(store, proxy, names, [])

    assert (summary.uploaded, summary.failed) == (3, 0)
    assert (cache.count("nar"), cache.count("complete"), cache.count("pack")) == (4, 0, 1)


async def test_who_wants_lengths_and_takes_no_parts_is_told_of(store: TemporaryStore) -> None:
    names = fill(store, 100)
    told: list[Event] = []
    async with FakeCache() as cache, TcpProxy(port(cache)).running() as proxy:
        cache.fail("nar", answer(411))
        summary = await pushed(store, proxy, names, told)

    assert summary.failed == 1
    (failed,) = (event for event in told if isinstance(event, Failed))
    assert "takes no NAR whose length is not known" in failed.error


async def test_connections_that_end_when_they_are_used_again(store: TemporaryStore) -> None:
    """As idle ones do, just then: nobody has to wait for that."""
    names = fill(store, *[2 * MIB] * 6, *[100 * KIB] * 30)
    told: list[Event] = []
    async with FakeCache(part_size=MIB, packs=PACKS) as cache, TcpProxy(port(cache), requests=1).running() as proxy:
        summary = await pushed(store, proxy, names, told)

    assert (summary.uploaded, summary.failed, noted(told)) == (len(names), 0, [])
    assert [event for event in told if isinstance(event, Retrying)] == []
    assert proxy.ended > 5


async def test_who_looks_at_one_connection_at_a_time(store: TemporaryStore) -> None:
    """All others are silent meanwhile."""
    names = fill(store, 2 * MIB, 2 * MIB, *[100 * KIB] * 10)
    patient = Options(
        backoff=Backoff(attempts=30, first=0.02, longest=0.1), timeouts=Timeouts(answer=0.5, stall=0.5, store=0.5)
    )
    told: list[Event] = []
    async with (
        FakeCache(part_size=MIB, packs=PACKS) as cache,
        TcpProxy(port(cache), one_at_a_time=True).running() as proxy,
    ):
        summary = await pushed(store, proxy, names, told, patient)

    assert (summary.uploaded, summary.failed) == (len(names), 0)
