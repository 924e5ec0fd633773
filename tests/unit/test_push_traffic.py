"""Servers that do not bear all that a push could send at once."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import ServerError
from cachesrv.push import events, run
from cachesrv.push.address import Address
from cachesrv.push.retry import Backoff, Overloaded, TryAgain, Unreachable
from cachesrv.push.run import Options, push
from cachesrv.push.settings import Settings
from cachesrv.push.token import TokenVariable
from cachesrv.push.traffic import Traffic
from tests.push_doubles import PLENTY, FakeCache, TemporaryStore, answer, drop, store_path

if TYPE_CHECKING:
    from aiohttp import web

MIB = 2**20
QUICK = Options(jobs=12, backoff=Backoff(attempts=12, first=0.01), timeouts=PLENTY)


def settings(cache: FakeCache) -> Settings:
    return Settings(Address.parse(cache.url), TokenVariable.of("CACHESRV_TOKEN", "secret"))


def fill(store: TemporaryStore, count: int, size: int = 5) -> list[str]:
    """Files of random bytes; their paths."""
    content = random.Random(1).randbytes(size)
    for number in range(count):
        store.add(f"file-{number}", b"%d" % number + content)
    return [store_path(f"file-{number}").full("/nix/store") for number in range(count)]


@pytest.mark.parametrize("bears", [2, 5])
async def test_a_push_does_not_go_on_with_more_than_the_server_bears(store: TemporaryStore, bears: int) -> None:
    cache = FakeCache(bears=bears)

    async def slowly(request: web.Request) -> web.StreamResponse:
        response = await cache._put(request)
        await asyncio.sleep(0.02)
        return response

    cache.fail("nar", *[slowly] * 1000)
    paths = fill(store, 60)
    insistent = replace(QUICK, backoff=Backoff(attempts=1000, first=0.002, longest=0.004))
    async with cache:
        summary = await push(paths, store, settings(cache), insistent)

    assert (summary.uploaded, summary.failed) == (60, 0)
    assert max(cache.crowds[len(cache.crowds) // 2 :]) <= 2 * bears  # without a limit all are there


@pytest.mark.parametrize("bears", [2, 5])
async def test_it_settles_near_what_the_server_bears(bears: int) -> None:
    """Counted in rounds of the event loop, whatever time they take: each request that is served takes several."""
    traffic = Traffic(QUICK.jobs, patience=1)
    crowds: list[int] = []
    under_way = 0

    async def ask() -> None:
        nonlocal under_way
        async with traffic.request(streams=True):
            under_way += 1
            crowds.append(under_way)
            try:
                if under_way > bears:
                    raise Overloaded("too many")
                for _ in range(10):
                    await asyncio.sleep(0)
            finally:
                under_way -= 1

    async def insist() -> None:
        for _ in range(20):
            served = False
            while not served:
                with suppress(Overloaded):
                    await ask()
                    served = True

    await asyncio.gather(*(insist() for _ in range(QUICK.jobs)))
    later = crowds[len(crowds) // 2 :]
    assert sum(crowd > bears for crowd in later) < len(later) / 3
    assert sum(later) / len(later) > bears / 2


async def test_parts_and_streams_do_not_wait_for_each_other_in_a_circle(
    store: TemporaryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All the memory of the push is held by large NARs whose parts have to wait until what streams has left."""
    monkeypatch.setattr(run, "MAX_PARTS", 1 - QUICK.jobs)  # one request at a time
    small = fill(store, 12, MIB // 2)
    for number in range(4):
        store.add(f"large-{number}", random.Random(number).randbytes(12 * MIB))
    large = [store_path(f"large-{number}").full("/nix/store") for number in range(4)]
    async with FakeCache(part_size=MIB) as cache, asyncio.timeout(60):
        summary = await push(small + large, store, settings(cache), replace(QUICK, memory=24 * MIB))

    assert (summary.uploaded, summary.failed) == (16, 0)


async def test_retry_after_holds_for_all(store: TemporaryStore, cache: FakeCache) -> None:
    """Who asks to be left alone sees nobody before that time, but for those who were on their way already."""
    asked: list[float] = []
    now = asyncio.get_running_loop().time

    async def note(request: web.Request) -> web.StreamResponse:
        asked.append(now())
        return await cache._put(request)

    turned_away: list[float] = []

    async def turn_away(request: web.Request) -> web.StreamResponse:
        turned_away.append(now())
        return await answer(429, "", Retry_After="1")(request)

    cache.fail("nar", turn_away, *[note] * 100)
    summary = await push(fill(store, 40), store, settings(cache), replace(QUICK, jobs=2))

    assert (summary.uploaded, summary.failed) == (40, 0)
    (since,) = turned_away
    assert all(one >= since + 0.99 for one in asked[1:])


async def test_who_wants_to_be_left_alone_for_long_is(store: TemporaryStore, cache: FakeCache) -> None:
    """The push ends with what the server said, without asking again for each path."""
    cache.fail("nar", *[answer(503, "closed for the day", Retry_After="86400")] * 40)
    told: list[events.Event] = []
    with pytest.raises(ServerError, match="closed for the day") as caught:
        await push(fill(store, 40), store, settings(cache), QUICK, told.append)

    assert isinstance(caught.value, TryAgain)
    assert caught.value.retry_after == 86400
    assert cache.count("nar") <= QUICK.jobs
    assert not [event for event in told if isinstance(event, events.Failed | events.Retrying)]


async def test_broken_connections_count(store: TemporaryStore, cache: FakeCache) -> None:
    cache.fail("nar", *[drop] * 12)
    summary = await push(fill(store, 30), store, settings(cache), QUICK)
    assert (summary.uploaded, summary.failed) == (30, 0)


@pytest.mark.parametrize(
    ("error", "limit"),
    [(Overloaded("o"), 4), (Unreachable("u"), 4), (TryAgain("t"), 8), (ServerError("s"), 8), (ValueError("v"), 8)],
)
async def test_what_counts_as_too_much(error: Exception, limit: int) -> None:
    traffic = Traffic(8, patience=1)
    with pytest.raises(type(error)):
        async with traffic.request():
            raise error
    assert traffic.limit == limit
