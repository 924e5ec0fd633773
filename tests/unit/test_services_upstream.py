"""Upstream caches: what they offer is believed when it is signed; what they do wrong is nobody's absence."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from cachesrv.errors import PeerError, PeerUnavailable
from cachesrv.nix import narinfo
from cachesrv.nix.signing import SecretKey, verify_any
from cachesrv.services import breaker as breaking
from cachesrv.services.breaker import Breaker
from cachesrv.services.caches import DeclaredUpstream
from cachesrv.services.http_reader import HttpReader
from cachesrv.services.store_reader import StoreReader
from cachesrv.services.upstream import Upstream, Upstreams, our_name
from cachesrv.storage.memory import MemoryStore
from tests.fake_upstream import KEY, FakeUpstream, cut, drop, sent, silent, status, unsized, waiting
from tests.samples import Sample
from tests.service_site import KEY as OWN_KEY
from tests.service_site import served_cache
from tests.waiting import PLENTY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.fake_upstream import Fault

SAMPLE = Sample("sample", b"content" * 1000, compression="zstd")
HASH_PART = SAMPLE.path.hash_part
NARINFO = f"{HASH_PART}.narinfo"
ABSENT = "0" * 32
PULLING = served_cache(pull_through=True)


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def server() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as server:
        server.add(SAMPLE)
        yield server


@pytest.fixture
async def other() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as server:
        yield server


def upstream_at(
    server: FakeUpstream, session: aiohttp.ClientSession, *, name: str = "up", breaker: Breaker | None = None
) -> Upstream:
    keys = {KEY.name: KEY.public}
    return Upstream(name, HttpReader(session, server.url, timeout=PLENTY), keys, breaker or Breaker())


@pytest.fixture
def upstream(server: FakeUpstream, session: aiohttp.ClientSession) -> Upstream:
    return upstream_at(server, session)


def of_main(*upstreams: Upstream, patience: float = PLENTY) -> Upstreams:
    return Upstreams(lambda cache: upstreams if cache.name == "main" else (), patience=patience)


async def test_what_is_signed_is_believed(upstream: Upstream, server: FakeUpstream) -> None:
    assert await upstream.narinfo(HASH_PART, "/nix/store") == narinfo.parse(server.objects[NARINFO])
    assert await upstream.narinfo(ABSENT, "/nix/store") is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"key": None}, "no valid signature by its public_keys"),
        ({"key": SecretKey.generate("stranger-1")}, "no valid signature"),
        ({"key": SecretKey.generate(KEY.name)}, "no valid signature"),
        ({"nar_size": 7}, "no valid signature"),
        ({"references": (Sample("other").path,)}, "no valid signature"),
        ({"store_path": Sample("other").path}, "sent the narinfo of .*-other for"),
        ({"store_dir": "/gnu/store"}, "sent the narinfo of /gnu/store"),
        ({"compression": "lrzip"}, "compression 'lrzip' cannot be read"),
    ],
)
async def test_what_cannot_be_believed_is_neither_there_nor_absent(
    upstream: Upstream, server: FakeUpstream, changes: dict[str, Any], text: str
) -> None:
    server.add(SAMPLE, **changes)
    for _ in range(5):
        with pytest.raises(PeerError, match=f"upstream up.*{text}") as failure:
            await upstream.narinfo(HASH_PART, "/nix/store")
        assert not isinstance(failure.value, PeerUnavailable)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "cannot be used"),
        (b"<html>blocked by policy</html>", "cannot be used"),
        (b"\xff" * 100, "cannot be used"),
        (bytes(2**20 + 1), "more than 1048576 bytes"),
        (b"StorePath: /nix/store/x\n", "cannot be used"),
    ],
)
async def test_what_is_no_narinfo_is_no_absence(
    upstream: Upstream, server: FakeUpstream, content: bytes, text: str
) -> None:
    server.objects[NARINFO] = content
    with pytest.raises(PeerError, match=text):
        await upstream.narinfo(HASH_PART, "/nix/store")


@pytest.mark.parametrize("fault", [status(500), status(503), status(429), drop, cut(bytes(100), 10)])
async def test_who_does_not_answer_is_left_alone_for_a_while(
    upstream: Upstream, server: FakeUpstream, fault: Fault
) -> None:
    server.fail(NARINFO, *[fault] * 10)
    for _ in range(breaking.FAILURES):
        with pytest.raises(PeerUnavailable, match="upstream up: "):
            await upstream.narinfo(HASH_PART, "/nix/store")
    before = server.requests.total()
    for _ in range(10):
        with pytest.raises(PeerUnavailable, match="left alone for a while"):
            await upstream.narinfo(HASH_PART, "/nix/store")
        with pytest.raises(PeerUnavailable, match="left alone for a while"):
            await anext(upstream.read(SAMPLE.info, 0))
    assert server.requests.total() == before


async def test_who_says_how_long_is_left_alone_at_once(upstream: Upstream, server: FakeUpstream) -> None:
    server.fail(NARINFO, status(503, Retry_After="30"))
    for _ in range(2):
        with pytest.raises(PeerUnavailable):
            await upstream.narinfo(HASH_PART, "/nix/store")
    assert server.asked(NARINFO) == 1


async def test_it_is_asked_again_after_a_while(server: FakeUpstream, session: aiohttp.ClientSession) -> None:
    now = 0.0
    upstream = upstream_at(server, session, breaker=Breaker(lambda: now))
    server.fail(NARINFO, *[status(500)] * breaking.FAILURES)
    for _ in range(breaking.FAILURES + 1):
        with pytest.raises(PeerUnavailable):
            await upstream.narinfo(HASH_PART, "/nix/store")
    now += breaking.PAUSE_SECONDS
    assert await upstream.narinfo(HASH_PART, "/nix/store")


async def test_a_transfer_that_breaks_does_not_count(upstream: Upstream, server: FakeUpstream) -> None:
    name = f"nar/{SAMPLE.nar_name}"
    server.objects[name] = bytes(10**6)
    server.fail(name, *[cut(bytes(10**6), 500_000)] * 10)
    for _ in range(5):
        with pytest.raises(PeerUnavailable, match="upstream up: "):
            [chunk async for chunk in upstream.read(SAMPLE.info, 0)]
    assert await upstream.narinfo(HASH_PART, "/nix/store")


async def test_the_size_of_a_nar(upstream: Upstream, server: FakeUpstream) -> None:
    info = server.add(SAMPLE)
    name = f"nar/{SAMPLE.nar_name}"
    assert await upstream.size(info) == len(SAMPLE.file)
    assert server.asked(name, "HEAD") == 0
    # where the narinfo does not say it, the server does
    assert await upstream.size(replace(info, file_size=None)) == len(SAMPLE.file)
    assert server.asked(name, "HEAD") == 1
    # or it is that of the NAR itself
    assert await upstream.size(replace(info, file_size=None, compression="none")) == len(SAMPLE.nar)
    # or nobody does
    server.fail(name, unsized(SAMPLE.file))
    assert await upstream.size(replace(info, file_size=None)) is None


async def test_not_too_many_questions_at_a_time(upstream: Upstream, server: FakeUpstream) -> None:
    gate = asyncio.Event()
    server.fail(NARINFO, *[waiting(gate, status(404))] * 200)
    asking = [asyncio.create_task(upstream.narinfo(HASH_PART, "/nix/store")) for _ in range(200)]
    for _ in range(2000):
        if server.asked(NARINFO) >= 64:
            break
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)  # for one too many
    assert server.asked(NARINFO) == 64
    gate.set()
    assert await asyncio.gather(*asking) == [None] * 200


async def test_upstreams_are_asked_in_order(
    server: FakeUpstream, other: FakeUpstream, session: aiohttp.ClientSession
) -> None:
    first, second = upstream_at(other, session, name="first"), upstream_at(server, session, name="second")
    found = await of_main(first, second).find(PULLING, HASH_PART)
    assert found
    assert found[0] is second
    assert (other.asked(NARINFO), server.asked(NARINFO)) == (1, 1)
    found = await of_main(second, first).find(PULLING, HASH_PART)
    assert found
    assert found[0] is second
    assert other.asked(NARINFO) == 1
    assert await of_main(first, second).find(PULLING, ABSENT) is None


@pytest.mark.parametrize("fault", [silent, drop, status(503), sent(b"nonsense"), status(403)])
async def test_one_that_fails_is_passed_over(
    server: FakeUpstream, other: FakeUpstream, session: aiohttp.ClientSession, fault: Fault
) -> None:
    other.fail(NARINFO, *[fault] * 10)
    both = of_main(upstream_at(other, session), upstream_at(server, session))
    assert await both.find(PULLING, HASH_PART)


@pytest.mark.parametrize("fault", [silent, drop, status(503)])
async def test_one_that_cannot_be_asked_is_no_absence(
    server: FakeUpstream, other: FakeUpstream, session: aiohttp.ClientSession, fault: Fault
) -> None:
    other.fail(f"{ABSENT}.narinfo", *[fault] * 10)
    both = of_main(upstream_at(other, session), upstream_at(server, session))
    with pytest.raises(PeerUnavailable):
        await both.find(PULLING, ABSENT)


async def test_what_may_pass_is_told_before_what_does_not(
    server: FakeUpstream, other: FakeUpstream, session: aiohttp.ClientSession
) -> None:
    for faults in ([status(403), status(503)], [status(503), status(403)]):
        for at, fault in zip((server, other), faults, strict=True):
            at.fail(f"{ABSENT}.narinfo", fault)
        both = of_main(upstream_at(other, session), upstream_at(server, session))
        with pytest.raises(PeerUnavailable):
            await both.find(PULLING, ABSENT)
    server.fail(f"{ABSENT}.narinfo", status(403))
    with pytest.raises(PeerError) as failure:
        await of_main(upstream_at(server, session)).find(PULLING, ABSENT)
    assert not isinstance(failure.value, PeerUnavailable)


async def test_one_that_hangs_is_soon_not_waited_for(server: FakeUpstream, session: aiohttp.ClientSession) -> None:
    server.fail(NARINFO, *[silent] * 100)
    loop = asyncio.get_running_loop()
    upstreams = of_main(upstream_at(server, session, breaker=Breaker(lambda: loop.time())))  # noqa: PLW0108  it is another one later
    for _ in range(breaking.FAILURES):
        with pytest.raises(PeerUnavailable, match="did not answer within"):
            await upstreams.find(PULLING, HASH_PART)
    for _ in range(10):
        with pytest.raises(PeerUnavailable, match="left alone"):
            await upstreams.find(PULLING, HASH_PART)
    assert server.asked(NARINFO) == breaking.FAILURES


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://cache.test/x", "https://cache.test/x"),
        ("https://user:pass@cache.test:8443/x@y", "https://cache.test:8443/x@y"),
        ("https://token@[::1]:80", "https://[::1]:80"),
        ("s3://bucket/prefix?region=eu-west-3", "s3://bucket/prefix?region=eu-west-3"),
    ],
)
def test_what_anybody_may_know_of_its_url(url: str, public: str) -> None:
    assert DeclaredUpstream("up", url, (), 5).public_url == public


async def test_what_was_resolved_counts_for_the_upstreams_of_then(upstream: Upstream, server: FakeUpstream) -> None:
    upstreams = Upstreams(lambda cache: [upstream] if cache.upstreams else [], patience=PLENTY)
    declared = DeclaredUpstream("up", server.url, (KEY.public.render(),), 5)
    assert await upstreams.resolve(served_cache(upstreams=(declared,)), [HASH_PART]) == {HASH_PART}
    assert await upstreams.resolve(served_cache(), [HASH_PART]) == set()


async def test_only_caches_that_pull_through_have_what_upstreams_have(upstream: Upstream, server: FakeUpstream) -> None:
    upstreams = of_main(upstream)
    assert await upstreams.narinfo(served_cache(), HASH_PART) is None
    assert await upstreams.narinfo(served_cache(name="other", pull_through=True), HASH_PART) is None
    assert server.requests.total() == 0
    assert await upstreams.narinfo(PULLING, ABSENT) is None


async def test_it_is_offered_as_ours(upstream: Upstream, server: FakeUpstream) -> None:
    theirs = server.add(SAMPLE)
    text = await of_main(upstream).narinfo(PULLING, HASH_PART)
    assert text
    ours = narinfo.parse(text)
    assert ours.url == f"nar/{SAMPLE.nar_name}?path={HASH_PART}"
    for key in (KEY, OWN_KEY):
        assert verify_any(ours.fingerprint, ours.signatures, {key.name: key.public})
    assert replace(ours, url=theirs.url, signatures=theirs.signatures) == theirs


@pytest.mark.parametrize(
    ("changes", "by_nar_hash"),
    [
        ({}, False),
        ({"url": f"nar/{SAMPLE.nar_hash.bare_nix32}.nar.zst"}, False),
        ({"url": f"nar/{SAMPLE.nar_name}?hash=1"}, True),
        ({"url": f"https://elsewhere.test/nar/{SAMPLE.nar_name}"}, True),
        ({"url": "nar/0123.nar.zst"}, True),
        ({"url": f"nar/{'0' * 52}.nar.zst"}, True),
        ({"url": f"nar/{SAMPLE.nar_name.removesuffix('.zst')}"}, True),
        ({"url": f"deep/nar/{SAMPLE.nar_name}"}, True),
        ({"file_hash": None}, True),
    ],
)
def test_its_nar_gets_a_name_that_says_what_it_is(changes: dict[str, Any], by_nar_hash: bool) -> None:
    info = replace(SAMPLE.info, **changes)
    name = our_name(info)
    if by_nar_hash:
        assert name == f"{SAMPLE.nar_hash.bare_nix32}.nar.zst"
    else:
        assert info.url == f"nar/{name}"


async def test_references_resolve_upstream(upstream: Upstream, server: FakeUpstream) -> None:
    samples = [Sample(f"sample-{number}") for number in range(40)]
    for sample in samples:
        server.add(sample)
    there = {sample.path.hash_part for sample in samples}
    upstreams = of_main(upstream)
    assert await upstreams.resolve(served_cache(), there | {ABSENT}) == there
    # what was there an hour ago is taken to be there, what was not is asked for again
    before = server.requests.total()
    assert await upstreams.resolve(served_cache(), there | {ABSENT}) == there
    assert server.requests.total() == before + 1
    assert await upstreams.resolve(served_cache(), []) == set()


async def test_references_are_not_missing_because_nobody_can_be_asked(upstream: Upstream, server: FakeUpstream) -> None:
    server.fail(NARINFO, status(503))
    with pytest.raises(PeerUnavailable):
        await of_main(upstream).resolve(served_cache(), [HASH_PART])


async def test_an_upstream_may_be_a_bucket() -> None:
    store = MemoryStore()
    upstream = Upstream("bucket", StoreReader(store), {KEY.name: KEY.public}, Breaker())
    assert await upstream.narinfo(HASH_PART, "/nix/store") is None
    info = replace(SAMPLE.info, signatures=(KEY.sign(SAMPLE.info.fingerprint),))
    await store.put_many({NARINFO: narinfo.render(info), f"nar/{SAMPLE.nar_name}": SAMPLE.file})
    assert await upstream.narinfo(HASH_PART, "/nix/store") == info
    assert await upstream.size(replace(info, file_size=None)) == len(SAMPLE.file)
    for start in (0, 1, len(SAMPLE.file) - 1):
        assert b"".join([chunk async for chunk in upstream.read(info, start)]) == SAMPLE.file[start:]
    with pytest.raises(PeerError, match="become shorter"):
        await anext(upstream.read(info, len(SAMPLE.file)))
    for url in ("nar/gone", "https://elsewhere.test/x", "../x"):
        with pytest.raises(PeerError, match="upstream bucket: "):
            await anext(upstream.read(replace(info, url=url), 0))
    await store.put(NARINFO, bytes(2**20 + 1), replace=True)
    with pytest.raises(PeerError):
        await upstream.narinfo(HASH_PART, "/nix/store")


async def test_a_bucket_that_cannot_be_reached_is_no_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    from cachesrv.errors import StoreError, StoreUnavailable  # noqa: PLC0415

    store = MemoryStore()
    upstream = Upstream("bucket", StoreReader(store), {KEY.name: KEY.public}, Breaker())
    for error, kind in ((StoreUnavailable("no route"), PeerUnavailable), (StoreError("denied"), PeerError)):

        async def fail(*_: object, error: Exception = error, **__: object) -> bytes:
            raise error

        monkeypatch.setattr(store, "get", fail)
        with pytest.raises(kind) as failure:
            await upstream.narinfo(HASH_PART, "/nix/store")
        assert isinstance(failure.value, PeerUnavailable) is (kind is PeerUnavailable)
