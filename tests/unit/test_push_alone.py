"""NARs of a single part straight to the server's storage, and through the server when that fails."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cachesrv.push import events
from cachesrv.push.address import Address
from cachesrv.push.connection import Timeouts
from cachesrv.push.retry import Backoff
from cachesrv.push.run import Options, push
from cachesrv.push.settings import Settings
from cachesrv.push.token import TokenVariable
from tests.push_doubles import FakeCache, TemporaryStore, answer, drop, store_path

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aiohttp import web

    from tests.push_doubles import Handler

MIB = 2**20
CONTENT = random.Random(7).randbytes(5 * MIB)
NAMES = ["one", "two", "three"]
QUICK = Options(backoff=Backoff(attempts=4, first=0.01), timeouts=Timeouts(connect=20, answer=20, stall=20, store=20))


@pytest.fixture
def store(tmp_path: Path) -> TemporaryStore:
    store = TemporaryStore(tmp_path)
    for number, name in enumerate(NAMES):
        store.add(name, CONTENT[number:])
    return store


@pytest.fixture
async def cache() -> AsyncIterator[FakeCache]:
    async with FakeCache(part_size=32 * MIB, direct=True) as running:
        yield running


async def pushed(
    store: TemporaryStore, cache: FakeCache, *names: str, memory: int = 256
) -> tuple[events.Summary, list[events.Event]]:
    """All of them, and what was told meanwhile; what the cache has then is what was to be pushed."""
    told: list[events.Event] = []
    settings = Settings(Address.parse(cache.url), TokenVariable.of("CACHESRV_TOKEN", "secret"))
    paths = [store_path(name).full("/nix/store") for name in names or NAMES]
    summary = await push(paths, store, settings, replace(QUICK, memory=memory * MIB), told.append)
    assert cache.nars.keys() >= {store.infos[store_path(name)].nar_hash.nix32 for name in names or NAMES}
    return summary, told


def notes(told: list[events.Event]) -> list[str]:
    return [event.text for event in told if isinstance(event, events.Noted)]


async def test_they_go_to_the_bucket(store: TemporaryStore, cache: FakeCache) -> None:
    """With what was signed, no token, and nothing begun before."""
    summary, told = await pushed(store, cache)

    routes = ("file", "bucket", "complete", "begin", "sign", "part", "nar")
    assert [cache.count(route) for route in routes] == [3, 3, 3, 0, 0, 0, 0]
    assert summary.sent_bytes == sum(map(len, cache.nars.values()))
    assert sum(event.sent_bytes for event in told if isinstance(event, events.Sent)) == summary.sent_bytes
    for headers in cache.seen_by_bucket:
        assert "Authorization" not in headers
        assert "Cookie" not in headers


async def test_small_ones_do_not(store: TemporaryStore, cache: FakeCache) -> None:
    """They are one request to the server, and many at the bucket."""
    store.add("small", CONTENT[: 3 * MIB])
    await pushed(store, cache, "small")

    assert (cache.count("nar"), cache.count("bucket")) == (1, 0)


async def test_one_that_was_there_all_along_is_not_sent(store: TemporaryStore, cache: FakeCache) -> None:
    async def meanwhile(request: web.Request) -> web.StreamResponse:
        cache.nars[store.infos[store_path("one")].nar_hash.nix32] = b"as somebody else has sent it"
        return await cache._file(request)

    cache.fail("file", meanwhile)
    summary, told = await pushed(store, cache, "one")

    assert (cache.count("bucket"), cache.count("complete")) == (0, 0)
    assert (summary.uploaded, summary.sent_bytes) == (1, 0)
    assert [(event.sent_bytes, event.level) for event in told if isinstance(event, events.Stored)] == [(0, 0)]


@pytest.mark.parametrize(
    "fault",
    [
        drop,
        answer(503, "<Error><Code>SlowDown</Code></Error>"),
        answer(400, "<Error><Code>BadDigest</Code></Error>"),
        answer(403, "<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"),
    ],
    ids=["drop", "slow-down", "altered", "expired"],
)
async def test_what_passes_is_tried_again_with_another_url(
    store: TemporaryStore, cache: FakeCache, fault: Handler
) -> None:
    cache.fail("bucket", fault)
    _, told = await pushed(store, cache)

    assert (cache.count("file"), cache.count("bucket"), cache.count("nar")) == (4, 4, 0)
    assert notes(told) == []


async def test_the_server_is_asked_as_often_as_ever(store: TemporaryStore, cache: FakeCache) -> None:
    """What is tried less often is a bucket that has not been reached yet."""
    cache.fail("file", *[answer(503)] * (QUICK.backoff.attempts - 1))
    summary, _ = await pushed(store, cache, "one")

    assert (summary.uploaded, cache.count("file"), cache.count("bucket")) == (1, QUICK.backoff.attempts, 1)


@pytest.mark.parametrize(
    "faults",
    [
        [answer(400, "<Error><Code>InvalidRequest</Code></Error>")],
        [answer(404, "<Error><Code>NoSuchBucket</Code></Error>")],
        [drop] * 20,
        [answer(200)],
    ],
    ids=["refused", "no-bucket", "gone", "without-an-etag"],
)
async def test_where_the_bucket_fails_they_go_through_the_server(
    store: TemporaryStore, cache: FakeCache, faults: list[Handler]
) -> None:
    cache.fail("bucket", *faults)
    summary, told = await pushed(store, cache, *NAMES)

    assert (summary.uploaded, summary.failed) == (3, 0)
    assert cache.count("nar") > 0
    (note,) = notes(told)
    assert "through the server instead" in note


@pytest.mark.parametrize("fault", [answer(404, "unknown"), None], ids=["older", "without-room"])
async def test_a_server_that_does_not_offer_it_is_not_asked_for_ever(
    store: TemporaryStore, cache: FakeCache, fault: Handler | None
) -> None:
    async def full(request: web.Request) -> web.StreamResponse:
        cache.direct = False
        return await cache._file(request)

    cache.fail("file", *[fault or full] * 3)
    store.add("later", CONTENT[10:])
    summary, told = await pushed(store, cache)
    assert (summary.uploaded, cache.count("nar"), notes(told)) == (3, 3, [])


async def test_one_that_is_lost_at_the_server_is_sent_again(store: TemporaryStore, cache: FakeCache) -> None:
    async def forget(request: web.Request) -> web.StreamResponse:
        cache.uploads.clear()
        return await cache._complete(request)

    cache.fail("complete", forget)
    await pushed(store, cache, "one")

    assert (cache.count("file"), cache.count("bucket")) == (2, 2)


async def test_one_that_is_refused_fails_alone(store: TemporaryStore, cache: FakeCache) -> None:
    cache.fail("complete", answer(422, "not what it should be"))
    told: list[events.Event] = []
    settings = Settings(Address.parse(cache.url), TokenVariable.of("CACHESRV_TOKEN", "secret"))
    paths = [store_path(name).full("/nix/store") for name in NAMES]
    summary = await push(paths, store, settings, QUICK, told.append)

    assert (summary.uploaded, summary.failed) == (2, 1)


async def test_what_a_proxy_would_refuse_goes_in_parts_when_the_bucket_fails(
    store: TemporaryStore, cache: FakeCache
) -> None:
    cache.part_size = MIB
    cache.fail("bucket", answer(400, "<Error><Code>InvalidRequest</Code></Error>"))
    summary, _ = await pushed(store, cache, "one")

    assert (summary.uploaded, cache.count("nar"), cache.count("part")) == (1, 0, 6)
