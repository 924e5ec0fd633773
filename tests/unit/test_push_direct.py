"""Parts of NARs to the server's storage: with nothing but what was signed, and through the server when that fails."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from cachesrv.push import elsewhere, events
from cachesrv.push.address import Address
from cachesrv.push.retry import Backoff
from cachesrv.push.run import Options, push
from cachesrv.push.settings import Settings
from cachesrv.push.token import TokenVariable
from cachesrv.push.traffic import Traffic
from tests.push_doubles import PLENTY, FakeCache, TemporaryStore, answer, drop, store_path

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.push_doubles import Handler

MIB = 2**20
LARGE = random.Random(6).randbytes(20 * MIB)
QUICK = Options(backoff=Backoff(attempts=4, first=0.01), timeouts=PLENTY)
REFUSED = answer(400, "<Error><Code>InvalidRequest</Code><Message>not\nso</Message></Error>")
EXPIRED = answer(403, "<Error><Code>AccessDenied</Code><Message>Request has\nexpired</Message></Error>")


@pytest.fixture
def store(tmp_path: Path) -> TemporaryStore:
    store = TemporaryStore(tmp_path)
    store.add("large", LARGE)
    return store


@pytest.fixture
async def cache() -> AsyncIterator[FakeCache]:
    async with FakeCache(part_size=MIB, direct=True) as running:
        yield running


async def pushed(
    store: TemporaryStore,
    cache: FakeCache,
    *names: str,
    told: list[events.Event] | None = None,
    memory: int = 256,
    options: Options = QUICK,
) -> events.Summary:
    settings = Settings(Address.parse(cache.url), TokenVariable.of("CACHESRV_TOKEN", "secret"))
    paths = [store_path(name).full("/nix/store") for name in names or ["large"]]
    options = replace(options, memory=memory * MIB)
    return await push(paths, store, settings, options, (told if told is not None else []).append)


def stored(store: TemporaryStore, cache: FakeCache, name: str = "large") -> bool:
    """As the double takes only what has the right hash."""
    return store.infos[store_path(name)].nar_hash.nix32 in cache.nars


def notes(told: list[events.Event]) -> list[str]:
    return [event.text for event in told if isinstance(event, events.Noted)]


async def test_parts_go_to_the_bucket(store: TemporaryStore, cache: FakeCache) -> None:
    """Three of them; only what was signed is sent along, and no token."""
    summary = await pushed(store, cache)

    assert stored(store, cache)
    assert (cache.count("sign"), cache.count("bucket"), cache.count("part"), cache.count("nar")) == (3, 3, 0, 0)
    assert summary.sent_bytes == len(next(iter(cache.nars.values())))
    for headers in cache.seen_by_bucket:
        assert "Authorization" not in headers
        assert "Cookie" not in headers


async def test_a_nar_of_one_part_that_the_proxy_would_refuse(store: TemporaryStore, cache: FakeCache) -> None:
    store.add("medium", LARGE[: 3 * MIB])
    store.add("small", LARGE[: MIB // 2])
    await pushed(store, cache, "medium", "small")

    assert stored(store, cache, "medium")
    assert stored(store, cache, "small")
    assert (cache.count("bucket"), cache.count("nar")) == (1, 1)


async def test_who_has_little_memory_sends_through_the_server(store: TemporaryStore, cache: FakeCache) -> None:
    await pushed(store, cache, memory=16)

    assert stored(store, cache)
    assert cache.count("bucket") == 0


async def test_what_was_sent_before_is_not_sent_again(store: TemporaryStore, cache: FakeCache) -> None:
    """Unless the bucket calls it something else."""
    cache.fail("complete", answer(422, "for once"))
    assert (await pushed(store, cache)).failed == 1
    cache.requests.clear()
    summary = await pushed(store, cache)

    assert stored(store, cache)
    assert cache.count("bucket") == 1
    assert summary.resumed_bytes == 16 * MIB


@pytest.mark.parametrize(
    "fault",
    [
        drop,
        answer(503, "<Error><Code>SlowDown</Code></Error>"),
        answer(400, "<Error><Code>BadDigest</Code></Error>"),
        answer(400, "<Error><Code>RequestTimeout</Code></Error>"),
        answer(400, "<Error><Code>ExpiredToken</Code></Error>"),
        EXPIRED,
    ],
    ids=["drop", "slow-down", "altered", "too-slow", "credentials-expired", "url-expired"],
)
async def test_what_passes_is_tried_again_with_another_url(
    store: TemporaryStore, cache: FakeCache, fault: Handler
) -> None:
    told: list[events.Event] = []
    cache.fail("bucket", fault)
    await pushed(store, cache, told=told)

    assert stored(store, cache)
    assert (cache.count("sign"), cache.count("bucket"), cache.count("part")) == (4, 4, 0)
    assert notes(told) == []


@pytest.mark.parametrize(
    "faults",
    [[REFUSED], [EXPIRED] * 20, [drop] * 20, [answer(200)]],
    ids=["refused", "denied", "gone", "without an ETag"],
)
async def test_where_the_bucket_fails_parts_go_through_the_server(
    store: TemporaryStore, cache: FakeCache, faults: list[Handler]
) -> None:
    store.add("other", LARGE[::-1])
    told: list[events.Event] = []
    cache.fail("bucket", *faults)
    summary = await pushed(store, cache, "large", "other", told=told)

    assert (summary.uploaded, summary.failed) == (2, 0)
    assert stored(store, cache)
    assert stored(store, cache, "other")
    assert cache.count("part") > 20
    (note,) = notes(told)
    assert "through the server instead" in note
    assert "\n" not in note
    if faults == [REFUSED]:
        assert "InvalidRequest: not so" in note
    # Nothing is left where nobody goes on with it.
    assert cache.count("abort") >= 1


async def test_no_url_is_asked_for_before_its_time(
    store: TemporaryStore, cache: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow link it would have expired when there is a connection for it."""
    monkeypatch.setattr(elsewhere, "Traffic", lambda _, patience: Traffic(1, patience=patience))
    await pushed(store, cache)

    assert stored(store, cache)
    assert [route for route in cache.requests if route in {"sign", "bucket"}] == ["sign", "bucket"] * 3


async def nowhere(request: web.Request) -> web.Response:
    """A fault: the URL of a bucket that cannot be reached."""
    await request.read()
    return web.json_response({"url": "http://127.0.0.1:1/bucket", "headers": {}})


async def test_a_bucket_that_cannot_be_reached_is_given_up_soon(store: TemporaryStore, cache: FakeCache) -> None:
    cache.fail("sign", *[nowhere] * 100)
    told: list[events.Event] = []
    await pushed(store, cache, told=told)

    assert stored(store, cache)
    assert cache.count("sign") <= 3 * 3
    assert "127.0.0.1:1" in notes(told)[0]


async def test_a_bucket_that_was_there_is_waited_for(store: TemporaryStore, cache: FakeCache) -> None:
    """More often than anything else is tried again: it is the network that is gone."""

    async def lose(request: web.Request) -> web.Response:
        cache.fail("sign", *[nowhere] * 20)
        return await cache._bucket(request)

    cache.fail("bucket", lose)
    told: list[events.Event] = []
    options = replace(QUICK, backoff=replace(QUICK.backoff, longest=0.02, outage=60), jobs=1)
    await pushed(store, cache, told=told, options=options)

    assert stored(store, cache)
    assert (cache.count("bucket"), cache.count("part"), notes(told)) == (3, 0, [])
    assert cache.count("sign") > 20


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "nonsense",
        "http://",
        "http://[bad/",
        "http://bucket:port/",
        "http://127.0.0.1:99999/",
        "http://a..b/",
    ],
)
async def test_a_url_that_is_none(store: TemporaryStore, cache: FakeCache, url: str) -> None:
    await check_that_nothing_is_sent(store, cache, url, {})


@pytest.mark.parametrize("headers", [{"x-amz-name": "a\r\nb: c"}, {"x-amz-\r\nb": "c"}, {"Content-MD5": "\0"}])
async def test_headers_that_are_none(store: TemporaryStore, cache: FakeCache, headers: dict[str, str]) -> None:
    await check_that_nothing_is_sent(store, cache, cache.url.replace("/main", "/bucket/0/1"), headers)


async def check_that_nothing_is_sent(
    store: TemporaryStore, cache: FakeCache, url: str, headers: dict[str, str]
) -> None:
    """As a server says by which parts were to go to its bucket."""

    async def sign(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response({"url": url, "headers": headers})

    cache.fail("sign", *[sign] * 3)
    await pushed(store, cache)

    assert stored(store, cache)
    assert cache.count("bucket") == 0


async def test_a_server_that_fails_is_not_taken_for_its_bucket(store: TemporaryStore, cache: FakeCache) -> None:
    cache.fail("sign", answer(503), drop)
    told: list[events.Event] = []
    await pushed(store, cache, told=told)

    assert stored(store, cache)
    assert (cache.count("bucket"), cache.count("part")) == (3, 0)
    assert notes(told) == []


async def test_an_upload_that_is_gone_is_begun_anew(store: TemporaryStore, cache: FakeCache) -> None:
    async def forget(request: web.Request) -> web.StreamResponse:
        cache.uploads.clear()
        return await cache._bucket(request)

    cache.fail("bucket", forget)
    await pushed(store, cache)

    assert stored(store, cache)
    assert cache.count("begin") == 2
    assert cache.count("part") == 0


async def test_a_server_that_has_changed_its_mind(store: TemporaryStore, cache: FakeCache) -> None:
    async def through(request: web.Request) -> web.StreamResponse:
        cache.direct = False
        return await cache._begin(request)

    cache.part_size = 8 * MIB
    cache.fail("begin", through)
    await pushed(store, cache)

    assert stored(store, cache)
    assert (cache.count("begin"), cache.count("part"), cache.count("bucket")) == (1, 3, 0)


async def test_a_server_without_room_in_its_storage_gets_smaller_parts(store: TemporaryStore, cache: FakeCache) -> None:
    """Of this NAR, and not of others."""

    async def through(request: web.Request) -> web.StreamResponse:
        cache.direct = False
        answered = await cache._begin(request)
        cache.direct = True
        return answered

    store.add("other", LARGE[::-1])
    cache.fail("begin", through)
    await pushed(store, cache, "large")

    assert stored(store, cache)
    assert (cache.count("part"), cache.count("bucket"), cache.count("abort")) == (21, 0, 1)
    await pushed(store, cache, "other")
    assert cache.count("bucket") == 3


@pytest.mark.parametrize("limits", [(8 * MIB + 1, 10_000), (5 * MIB, 2)], ids=["too-small", "too-many"])
async def test_a_storage_that_takes_other_parts(
    store: TemporaryStore, cache: FakeCache, limits: tuple[int, int]
) -> None:
    cache.direct_limits = limits
    await pushed(store, cache)

    assert stored(store, cache)
    assert (cache.count("part"), cache.count("bucket"), cache.count("abort")) == (21, 0, 1)


async def test_what_has_no_known_size_goes_through_the_server(store: TemporaryStore, cache: FakeCache) -> None:
    info = store.infos[store_path("large")]
    store.infos[store_path("large")] = replace(info, nar_size=0)
    store.unreadable.add(store_path("large"))
    await pushed(store, cache)

    assert stored(store, cache)
    assert (cache.count("part"), cache.count("bucket")) == (21, 0)
