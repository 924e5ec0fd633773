"""A push from end to end, against a cache that can be made to fail."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import zstandard

from cachesrv import api
from cachesrv.errors import BadInput, ConfigError, NotAuthenticated, ServerError
from cachesrv.nix import narinfo
from cachesrv.nix.nar_writer import dump
from cachesrv.nix.signing import SecretKey
from cachesrv.push import events
from cachesrv.push.address import Address
from cachesrv.push.retry import Backoff
from cachesrv.push.run import Options, push
from cachesrv.push.settings import Settings
from cachesrv.push.token import TokenVariable
from cachesrv.push.upstreams import Upstream
from tests.fake_upstream import KEY, FakeUpstream
from tests.push_doubles import HURRY, PLENTY, FakeCache, TemporaryStore, answer, drop, hang, signed_narinfo, store_path

if TYPE_CHECKING:
    from aiohttp import web

    from tests.push_doubles import Handler

QUICK = Options(backoff=Backoff(attempts=3, first=0.01), timeouts=PLENTY)


def settings(cache: FakeCache, token: str = "secret") -> Settings:
    return Settings(Address.parse(cache.url), TokenVariable.of("CACHESRV_TOKEN", token))


def full(*names: str) -> list[str]:
    return [store_path(name).full("/nix/store") for name in names]


def diamond(store: TemporaryStore) -> None:
    store.add("base", b"base" * 1000)
    store.add("left", {"file": b"left"}, ["base", "left"])
    store.add("right", b"right", ["base"])
    store.add("top", b"top", ["left", "right"])


async def test_a_closure_arrives_whole_and_in_order(store: TemporaryStore, cache: FakeCache) -> None:
    diamond(store)
    told: list[events.Event] = []

    summary = await push(full("top"), store, settings(cache), QUICK, told.append)

    assert (summary.paths, summary.uploaded, summary.failed) == (4, 4, 0)
    assert list(cache.published) == sorted(cache.published, key=[p for b in cache.batches for p in b].index)
    for info in store.infos.values():
        published = cache.published[info.store_path.base_name]
        assert published.references == [path.base_name for path in info.references]
        nar = b"".join(dump(store.directory / info.store_path.base_name))
        assert (
            zstandard.ZstdDecompressor()
            .decompressobj(read_across_frames=True)
            .decompress(cache.nars[published.nar_hash])
            == nar
        )
    assert told[-1] == summary
    assert summary.nar_bytes == sum(info.nar_size for info in store.infos.values())
    assert summary.sent_bytes == sum(map(len, cache.nars.values()))


async def test_a_repeated_push_sends_nothing(store: TemporaryStore, cache: FakeCache) -> None:
    diamond(store)
    await push(full("top"), store, settings(cache), QUICK)
    cache.requests.clear()

    summary = await push(full("top"), store, settings(cache), QUICK)

    assert cache.requests == ["cache", "missing"]
    assert (summary.present, summary.uploaded, summary.sent_bytes) == (4, 0, 0)


@pytest.mark.parametrize("options", [{"jobs": 0}, {"level": 0}, {"level": 20}, {"level": "fast"}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="has to be"):
        Options(**options)


async def test_paths_may_be_of_pathlib_but_have_to_be_several(store: TemporaryStore, cache: FakeCache) -> None:
    store.add("one", b"one")
    [path] = full("one")

    assert (await push([Path(path)], store, settings(cache), QUICK)).uploaded == 1
    single: Any
    for single in (path, Path(path)):
        with pytest.raises(BadInput, match="paths has to be a list: "):
            await push(single, store, settings(cache), QUICK)


async def test_what_is_no_signature_keeps_no_path_back(store: TemporaryStore, cache: FakeCache) -> None:
    """Nix keeps it as a cache has told it."""
    info = store.add("one", b"one")
    good = SecretKey.generate("key-1").sign(b"").render()
    store.infos[info.store_path] = replace(info, signatures=("none", "key-2:AAAA", good))

    summary = await push(full("one"), store, settings(cache), QUICK)

    assert summary.uploaded == 1
    assert cache.published[info.store_path.base_name].signatures == [good]


async def test_thousands_of_paths_are_few_questions(store: TemporaryStore, cache: FakeCache) -> None:
    names = [f"path-{number}" for number in range(api.MAX_BATCH + 1)]
    for name in names:
        info = store.add(name, b"same")
        cache.nars[info.nar_hash.nix32] = b"there"

    summary = await push(full(*names), store, settings(cache), QUICK)

    assert summary.uploaded == len(names)
    assert cache.requests == ["cache", "missing", "missing", "paths", "paths"]


async def test_equal_nars_are_sent_once(store: TemporaryStore, cache: FakeCache) -> None:
    for name in ("one", "two", "three"):
        store.add(name, b"equal")

    summary = await push(full("one", "two", "three"), store, settings(cache), QUICK)

    assert cache.count("nar") == 1
    assert summary.uploaded == 3


async def test_without_closure_only_what_was_named(store: TemporaryStore, cache: FakeCache) -> None:
    diamond(store)
    cache.elsewhere = {store_path("base").base_name}

    summary = await push(full("left"), store, settings(cache), Options(closure=False))

    assert list(cache.published) == [store_path("left").base_name]
    assert summary.paths == 1


async def test_dry_run_changes_nothing(store: TemporaryStore, cache: FakeCache) -> None:
    diamond(store)
    told: list[events.Event] = []

    summary = await push(full("top"), store, settings(cache), Options(dry_run=True), told.append)

    assert cache.requests == ["cache", "missing"]
    assert {event.path: event.decision for event in told if isinstance(event, events.Planned)} == {
        store_path(name).base_name: "upload" for name in ("base", "left", "right", "top")
    }
    assert (summary.paths, summary.uploaded, summary.failed) == (4, 0, 0)


async def test_a_name_that_leads_nowhere_does_not_stop_the_others(store: TemporaryStore, cache: FakeCache) -> None:
    store.add("good", b"good")
    told: list[events.Event] = []

    summary = await push(["nowhere", *full("gone", "good")], store, settings(cache), QUICK, told.append)

    assert (summary.paths, summary.uploaded, summary.failed) == (3, 1, 2)
    failed = [(event.path, event.kind) for event in told if isinstance(event, events.Failed)]
    assert failed == [("nowhere", "not-found"), (full("gone")[0], "not-found")]


async def test_only_wrong_names_ask_nobody(store: TemporaryStore, cache: FakeCache) -> None:
    summary = await push(["nowhere"], store, settings(cache), QUICK)

    assert cache.requests == []
    assert summary.failed == 1


async def test_a_damaged_path_and_what_needs_it_fail_and_nothing_else(store: TemporaryStore, cache: FakeCache) -> None:
    diamond(store)
    store.file("left").joinpath("file").write_bytes(b"LEFT")
    told: list[events.Event] = []

    summary = await push(full("top"), store, settings(cache), QUICK, told.append)

    assert set(cache.published) == {store_path(name).base_name for name in ("base", "right")}
    errors = {event.path: event.error for event in told if isinstance(event, events.Failed)}
    assert "hash" in errors[store_path("left").base_name]
    assert "refers to" in errors[store_path("top").base_name]
    kinds = {event.path: event.kind for event in told if isinstance(event, events.Failed)}
    assert kinds == {store_path("left").base_name: "damaged", store_path("top").base_name: "missing-references"}
    assert (summary.uploaded, summary.failed) == (2, 2)
    assert store.infos[store_path("left")].nar_hash.nix32 not in cache.nars


async def test_an_intact_twin_stands_in_for_a_damaged_path(store: TemporaryStore, cache: FakeCache) -> None:
    store.add("one", b"equal")
    store.add("two", b"equal")
    store.file("one").write_bytes(b"EQUAL")

    summary = await push(full("one", "two"), store, settings(cache), QUICK)

    assert (summary.uploaded, summary.failed) == (1, 1) or summary.uploaded == 2
    assert store_path("two").base_name in cache.published


async def test_a_path_that_is_published_otherwise_is_a_conflict(store: TemporaryStore, cache: FakeCache) -> None:
    diamond(store)
    await push(full("base"), store, settings(cache), QUICK)
    there = store.infos[store_path("base")].nar_hash.nix32
    store.file("base").unlink()
    here = store.add("base", b"other").nar_hash.nix32
    told: list[events.Event] = []

    summary = await push(full("top"), store, settings(cache), QUICK, told.append)

    (failed,) = (event for event in told if isinstance(event, events.Failed))
    assert there in failed.error
    assert here in failed.error
    assert failed.kind == "conflict"
    assert (summary.uploaded, summary.failed) == (3, 1)


async def test_a_nar_that_the_server_refuses_fails_its_path(store: TemporaryStore, cache: FakeCache) -> None:
    store.add("bad", b"bad")
    store.add("good", b"good")
    cache.fail("nar", answer(409, "it has another NAR\x1b[31m\nand more"))

    told: list[events.Event] = []
    summary = await push(full("bad", "good"), store, settings(cache), Options(jobs=1), told.append)

    (failed,) = (event for event in told if isinstance(event, events.Failed))
    assert failed.error == "it has another NAR [31m and more"
    assert (summary.uploaded, summary.failed) == (1, 1)


async def test_a_nar_too_large_for_the_cache_fails_its_path(store: TemporaryStore, cache: FakeCache) -> None:
    store.add("large", random.Random(1).randbytes(100_000))
    store.add("small", b"small")
    cache.max_nar_size = 50_000
    told: list[events.Event] = []

    summary = await push(full("large", "small"), store, settings(cache), QUICK, told.append)

    (failed,) = (event for event in told if isinstance(event, events.Failed))
    assert "50000 bytes" in failed.error
    assert failed.kind == "too-large"
    assert (summary.uploaded, summary.failed) == (1, 1)


@pytest.mark.parametrize(
    "fault", [drop, answer(503, "later", Retry_After="0"), answer(500), answer(429), hang], ids=lambda f: f.__name__
)
async def test_what_passes_is_tried_again(store: TemporaryStore, cache: FakeCache, fault: Handler) -> None:
    info = store.add("large", random.Random(2).randbytes(24_000_000))
    cache.fail("nar", fault)
    told: list[events.Event] = []

    options = replace(QUICK, timeouts=HURRY) if fault is hang else QUICK
    summary = await push(full("large"), store, settings(cache), options, told.append)

    assert [event.attempt for event in told if isinstance(event, events.Retrying)] == [1]
    assert info.store_path.base_name in cache.published
    assert (summary.uploaded, summary.failed) == (1, 0)
    asked = [route for route in cache.requests[1:] if route != "cache"]
    assert asked == ["missing", "nar", "missing", "nar", "paths"]


async def test_an_answer_that_was_lost_is_not_paid_for_twice(store: TemporaryStore, cache: FakeCache) -> None:
    info = store.add("path", b"contents")

    async def store_and_drop(request: web.Request) -> web.StreamResponse:
        cache.nars[info.nar_hash.nix32] = await request.read()
        return await drop(request)

    cache.fail("nar", store_and_drop)

    await push(full("path"), store, settings(cache), QUICK)

    assert cache.requests == ["cache", "missing", "nar", "missing", "paths"]


async def test_nars_that_the_server_lost_are_sent_again(store: TemporaryStore, cache: FakeCache) -> None:
    diamond(store)
    await push(full("base"), store, settings(cache), QUICK)
    lost = cache.published.pop(store_path("base").base_name)

    async def forget(request: web.Request) -> web.StreamResponse:
        answer = await cache._missing(request)
        del cache.nars[lost.nar_hash]
        return answer

    cache.fail("missing", forget)
    told: list[events.Event] = []
    summary = await push(full("top"), store, settings(cache), QUICK, told.append)

    assert (summary.uploaded, summary.failed) == (4, 0)
    assert len([event for event in told if isinstance(event, events.Published)]) == 4
    assert cache.count("nar") == 1 + 4


async def test_a_server_that_keeps_losing_a_nar_is_not_humoured(store: TemporaryStore, cache: FakeCache) -> None:
    diamond(store)

    async def forget(request: web.Request) -> web.StreamResponse:
        cache.nars.pop(store.infos[store_path("base")].nar_hash.nix32, None)
        return await cache._publish(request)

    cache.fail("paths", *[forget] * 9)
    summary = await push(full("top"), store, settings(cache), QUICK)

    assert (summary.uploaded, summary.failed) == (0, 4)
    assert cache.count("nar") == 4 + 1


async def test_retry_after_is_waited_for(store: TemporaryStore, cache: FakeCache) -> None:
    store.add("path", b"contents")
    cache.fail("missing", answer(503, "busy", Retry_After="1"))
    told: list[events.Event] = []

    await push(full("path"), store, settings(cache), QUICK, told.append)

    (retrying,) = (event for event in told if isinstance(event, events.Retrying))
    assert retrying.delay == 1
    assert "busy" in retrying.error


async def test_a_nar_that_never_gets_through_does_not_stop_the_others(store: TemporaryStore, cache: FakeCache) -> None:
    store.add("cursed", b"cursed")
    store.add("good", b"good")
    cache.fail("nar", drop, drop, drop)

    summary = await push(full("cursed", "good"), store, settings(cache), _one_at_a_time())

    assert (summary.uploaded, summary.failed) == (1, 1)


def _one_at_a_time() -> Options:
    return Options(jobs=1, backoff=QUICK.backoff, timeouts=QUICK.timeouts)


@pytest.mark.parametrize("route", ["cache", "missing", "nar", "paths"])
async def test_a_wrong_token_stops_everything(store: TemporaryStore, cache: FakeCache, route: str) -> None:
    diamond(store)
    cache.fail(route, answer(401, "no"))
    told: list[events.Event] = []

    with pytest.raises(NotAuthenticated, match=r"does not accept the token from \$CACHESRV_TOKEN: no") as caught:
        await push(full("top"), store, settings(cache), QUICK, told.append)

    assert "secret" not in str(caught.value)
    assert isinstance(told[-1], events.Summary)


async def test_a_server_that_is_gone_stops_everything(store: TemporaryStore) -> None:
    diamond(store)
    async with FakeCache() as cache:
        gone = settings(cache)

    with pytest.raises(ServerError, match="cannot be reached: Connection refused"):
        await push(full("top"), store, gone, QUICK)


async def test_a_server_that_makes_no_sense_stops_everything(store: TemporaryStore, cache: FakeCache) -> None:
    store.add("path", b"contents")
    cache.fail("missing", answer(200, "<html>"))

    with pytest.raises(ServerError, match="does not answer as the push API does"):
        await push(full("path"), store, settings(cache), QUICK)


async def test_a_cache_for_another_store_directory_is_refused(store: TemporaryStore, cache: FakeCache) -> None:
    store.add("path", b"contents")
    cache.store_dir = "/other/store"

    with pytest.raises(ConfigError, match="/other/store"):
        await push(full("path"), store, settings(cache), QUICK)


async def test_what_was_published_before_the_end_stays(store: TemporaryStore, cache: FakeCache) -> None:
    store.add("first", b"first")
    store.add("second", b"second", ["first"])

    async def no_more(request: web.Request) -> web.StreamResponse:
        await cache.publication.wait()
        return await answer(507, "full")(request)

    async def first_then_fault(request: web.Request) -> web.StreamResponse:
        cache.fail("nar", no_more)
        return await cache._put(request)

    cache.fail("nar", first_then_fault)

    with pytest.raises(ServerError, match=r"takes no more \(507 Insufficient Storage\): full"):
        await push(full("second"), store, settings(cache), _one_at_a_time())

    assert list(cache.published) == [store_path("first").base_name]


async def test_a_path_that_an_upstream_has_is_left_to_it(store: TemporaryStore, cache: FakeCache) -> None:
    async with FakeUpstream() as upstream:
        _sign(store, cache, upstream, "base")
        _hold(store, upstream, "base")
        cache.elsewhere = {store_path("base").base_name}

        summary = await push(full("top"), store, settings(cache), QUICK)

    assert (summary.upstream, summary.uploaded, summary.failed) == (1, 3, 0)
    assert store_path("base").base_name not in cache.published


async def test_a_path_that_the_upstream_does_not_have_is_sent(store: TemporaryStore, cache: FakeCache) -> None:
    async with FakeUpstream() as upstream:
        _sign(store, cache, upstream, "base")

        summary = await push(full("top"), store, settings(cache), QUICK)

    assert (summary.upstream, summary.uploaded, summary.failed) == (0, 4, 0)


async def test_what_the_server_does_not_find_there_is_sent_after_all(store: TemporaryStore, cache: FakeCache) -> None:
    told: list[events.Event] = []
    async with FakeUpstream() as upstream:
        _sign(store, cache, upstream, "base")
        _hold(store, upstream, "base")

        summary = await push(full("top"), store, settings(cache), QUICK, told.append)

    assert (summary.upstream, summary.uploaded, summary.failed) == (0, 4, 0)
    assert cache.count("nar") == 4
    assert not [event for event in told if isinstance(event, events.Failed)]


async def test_upstreams_may_be_passed_over_and_added(store: TemporaryStore, cache: FakeCache) -> None:
    cache.elsewhere = {store_path("base").base_name}
    async with FakeUpstream() as upstream:
        _sign(store, cache, upstream, "base")
        _hold(store, upstream, "base")
        dry = replace(QUICK, dry_run=True)
        alone = await push(full("top"), store, settings(cache), replace(dry, declared_upstreams=False))
        added = Upstream.from_answer(cache.upstreams.pop())
        with_it = await push(full("top"), store, settings(cache), replace(dry, upstreams=(added,)))

    assert (alone.upstream, with_it.upstream) == (0, 1)


async def test_references_that_nobody_has_are_told(store: TemporaryStore, cache: FakeCache) -> None:
    diamond(store)
    told: list[events.Event] = []

    summary = await push(full("left"), store, settings(cache), Options(closure=False), told.append)

    (failed,) = (event for event in told if isinstance(event, events.Failed))
    assert f"refers to {store_path('base')}" in failed.error
    assert summary.failed == 1


async def test_a_path_that_cannot_be_read_comes_from_the_daemon(store: TemporaryStore, cache: FakeCache) -> None:
    info = store.add("path", b"contents" * 10_000)
    store.unreadable.add(info.store_path)

    await push(full("path"), store, settings(cache), QUICK)

    assert info.store_path.base_name in cache.published


async def test_cancelling_leaves_nothing_behind(store: TemporaryStore, cache: FakeCache) -> None:
    store.add("path", random.Random(3).randbytes(20_000_000))
    sending = asyncio.Event()

    async def begin(request: web.Request) -> web.StreamResponse:
        sending.set()
        return await hang(request)

    cache.fail("nar", begin)
    pushing = asyncio.create_task(push(full("path"), store, settings(cache), Options()))
    await sending.wait()

    pushing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pushing

    assert asyncio.all_tasks() - {asyncio.current_task()} == {
        task for task in asyncio.all_tasks() if "RequestHandler" in repr(task.get_coro())
    }


def _sign(store: TemporaryStore, cache: FakeCache, upstream: FakeUpstream, name: str) -> None:
    """Let an upstream of the cache have signed a path of the diamond."""
    diamond(store)
    cache.upstreams = [api.UpstreamAnswer(upstream.url, [KEY.public.render()])]
    info = store.infos[store_path(name)]
    store.infos[info.store_path] = replace(info, signatures=(signed_narinfo(info).signatures[0].render(),))


def _hold(store: TemporaryStore, upstream: FakeUpstream, name: str) -> None:
    """Let an upstream have the narinfo of a path."""
    path = store_path(name)
    upstream.objects[f"{path.hash_part}.narinfo"] = narinfo.render(signed_narinfo(store.infos[path]))


async def test_a_path_fails_once(store: TemporaryStore, cache: FakeCache) -> None:
    """By what it refers to, and then by its own NAR, which was on its way already."""
    store.add("damaged", b"what it was")
    store.file("damaged").write_bytes(b"what it is now")
    store.add("top", b"top", ["damaged"])
    told: list[events.Event] = []
    hopeless = asyncio.Event()

    def tell(event: events.Event) -> None:
        told.append(event)
        if isinstance(event, events.Failed) and event.path == store_path("top").base_name:
            hopeless.set()

    async def refuse(request: web.Request) -> web.StreamResponse:
        await hopeless.wait()
        return await answer(400)(request)

    cache.fail("nar", refuse)
    cache.fail("nar", refuse)
    summary = await push(full("top"), store, settings(cache), QUICK, tell)

    assert summary.failed == 2
    failed = [event.path for event in told if isinstance(event, events.Failed)]
    assert failed == [store_path(name).base_name for name in ("damaged", "top")]
