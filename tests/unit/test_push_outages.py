"""A server that is away behind a proxy which answers in its place: waited for by time, unlike one that a NAR ends."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cachesrv.push.address import Address
from cachesrv.push.events import Failed, Retrying
from cachesrv.push.retry import Backoff, Unreachable
from cachesrv.push.run import Options, push
from cachesrv.push.settings import Settings
from cachesrv.push.token import TokenVariable
from tests.push_doubles import FakeCache, TemporaryStore, answer, store_path

if TYPE_CHECKING:
    from aiohttp import web

    from cachesrv.push.events import Event, Summary
    from tests.push_doubles import Handler

TRIES = 3
MIB = 2**20
BACKOFF = Backoff(attempts=TRIES, first=0.001, longest=0.002, outage=60)


@pytest.fixture
def store(store: TemporaryStore) -> TemporaryStore:
    store.add("first", b"first")
    store.add("second", b"second")
    return store


async def pushed(
    store: TemporaryStore, cache: FakeCache, told: list[Event], *names: str, backoff: Backoff = BACKOFF
) -> Summary:
    settings = Settings(Address.parse(cache.url), TokenVariable.of("CACHESRV_TOKEN", "secret"))
    paths = [store_path(name).full("/nix/store") for name in names]
    return await push(paths, store, settings, Options(jobs=1, backoff=backoff), told.append)


def ending(cache: FakeCache, status: int, questions: int) -> Handler:
    """A request at which the server ends; the proxy answers to that, and then to so many questions."""

    async def end(request: web.Request) -> web.StreamResponse:
        cache.fail("cache", *[answer(status)] * questions)
        return await answer(status)(request)

    return end


@pytest.mark.parametrize("status", [502, 503, 504])
@pytest.mark.parametrize("route", ["nar", "paths", "missing"])
async def test_an_outage_is_one_try(store: TemporaryStore, cache: FakeCache, route: str, status: int) -> None:
    """However long it is; and no NAR is sent into it."""
    cache.fail(route, ending(cache, status, 5 * TRIES))
    told: list[Event] = []
    summary = await pushed(store, cache, told, "first")

    assert (summary.uploaded, summary.failed) == (1, 0)
    assert cache.count("nar") == (2 if route == "nar" else 1)
    assert cache.count("cache") == 1 + 5 * TRIES + 1
    assert len([event for event in told if isinstance(event, Retrying)]) == 1 + 5 * TRIES


async def test_a_nar_at_which_the_server_ends_has_its_tries(store: TemporaryStore, cache: FakeCache) -> None:
    """No more of them, however often it comes back; others are pushed."""
    cache.fail("nar", *[ending(cache, 502, 2)] * TRIES)
    told: list[Event] = []
    summary = await pushed(store, cache, told, "first", "second")

    assert (summary.uploaded, summary.failed) == (1, 1)
    assert cache.count("nar") == TRIES + 1
    assert [event.kind for event in told if isinstance(event, Failed)] == ["server"]


async def test_an_outage_before_any_part_has_gone_to_the_storage(store: TemporaryStore) -> None:
    """Its storage gets few tries as long as it is not known to work, and nothing is wrong with that."""
    store.add("large", random.Random(1).randbytes(12 * MIB))
    async with FakeCache(part_size=5 * MIB, direct=True) as cache:
        cache.fail("sign", ending(cache, 502, 5 * TRIES))
        summary = await pushed(store, cache, [], "large")

    assert (summary.uploaded, summary.failed) == (1, 0)
    assert cache.count("bucket") > 0 == cache.count("part")


async def test_who_does_not_come_back_is_given_up(store: TemporaryStore, cache: FakeCache) -> None:
    cache.fail("nar", ending(cache, 503, 1000))
    with pytest.raises(Unreachable, match="status 503"):
        await pushed(store, cache, [], "first", "second", backoff=replace(BACKOFF, outage=0.05))
    assert cache.count("nar") == 1


async def test_a_proxy_may_say_for_how_long(store: TemporaryStore, cache: FakeCache) -> None:
    """That is heard: here it is too long."""
    cache.fail("nar", answer(502))
    cache.fail("cache", cache._cache, answer(503, Retry_After="301"))
    with pytest.raises(Unreachable, match="status 503"):
        await pushed(store, cache, [], "first")


async def test_who_is_there_but_has_too_much_to_do_is_no_outage(store: TemporaryStore, cache: FakeCache) -> None:
    cache.fail("nar", *[answer(503)] * TRIES)
    told: list[Event] = []
    summary = await pushed(store, cache, told, "first", "second")

    assert (summary.uploaded, summary.failed) == (1, 1)
    assert cache.count("nar") == TRIES + 1
