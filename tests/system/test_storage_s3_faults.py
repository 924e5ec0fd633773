"""S3 storage behind a proxy that fails: what passes is waited for, and nothing that is not whole looks whole."""

from __future__ import annotations

import asyncio
import os
import time
from hashlib import md5
from secrets import token_hex
from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import NotFound, StoreError, StoreUnavailable
from cachesrv.storage import s3_client
from cachesrv.storage.base import ByteRange, Piece
from cachesrv.storage.decorators import Direct, Guarded, Limited, Measured, Retrying
from cachesrv.storage.s3 import S3Store
from cachesrv.storage.s3_parts import MIN_PART_SIZE
from tests.system import fault_proxy
from tests.system.fault_proxy import SLOW_DOWN, FaultProxy
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.radosgw import Gateway

LIMIT = 2**24
LARGE = os.urandom(2 * MIN_PART_SIZE + 17)
SMALL = os.urandom(3 * 2**20)


@pytest.fixture(scope="module")
def shared_proxy(gateway: Gateway) -> Iterator[FaultProxy]:
    with FaultProxy(gateway.endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: FaultProxy) -> FaultProxy:
    shared_proxy.calm()
    return shared_proxy


@pytest.fixture
def limited() -> Limited:
    return Limited(Direct(), most=8)


@pytest.fixture
async def store(proxy: FaultProxy, limited: Limited, gateway: Gateway, bucket: str) -> AsyncIterator[S3Store]:
    store = S3Store(
        bucket,
        requests=Retrying(limited, attempts=4, first=0.01),
        endpoint=proxy.url,
        prefix=token_hex(8),
        session=gateway.session(),
        part_size=MIN_PART_SIZE,
    )
    yield store
    await store.close()


async def upload(store: S3Store, key: str, data: bytes = LARGE) -> bool:
    async with store.writer(key) as writer:
        for position in range(0, len(data), 2**20):
            await writer.write(data[position : position + 2**20])
        return await writer.commit()


async def whole(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


PASSING: dict[str, fault_proxy.Fault] = {
    "drop": fault_proxy.Drop(),
    "slow-down": fault_proxy.Answer(503, SLOW_DOWN),
    "bad-gateway": fault_proxy.Answer(502, b"<html>nginx</html>"),
    "lost": fault_proxy.LoseAnswer(),
    "late": fault_proxy.Delay(0.1),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
async def test_every_request_is_tried_again(store: S3Store, proxy: FaultProxy, fault: fault_proxy.Fault) -> None:
    """Each kind of request meets the fault once, and all calls answer as if nothing had happened."""
    for method, query in [("PUT", "X-Amz-Signature"), ("POST", "uploads"), ("PUT", "partNumber"), ("POST", "uploadId")]:
        proxy.plan(fault, method=method, query=query)
    proxy.plan(fault, method="HEAD")
    proxy.plan(fault, method="GET", query="list-type")
    proxy.plan(fault, method="GET", query="X-Amz-Signature")
    proxy.plan(fault, method="POST", query="delete")
    assert await store.put("main/a", b"a")
    assert not await store.put("main/a", b"b")
    assert await upload(store, "main/large")
    assert not await upload(store, "main/large", SMALL)
    assert await store.get("main/a", limit=LIMIT) == b"a"
    assert await whole(store.read("main/large")) == LARGE
    info = await store.head("main/large")
    assert info is not None
    assert info.size == len(LARGE)
    assert sorted([info.key async for info in store.list("")]) == ["main/a", "main/large"]
    await store.delete(["main/a", "main/large"])
    assert not [info async for info in store.list("")]
    assert not proxy.waiting


async def test_a_fault_that_stays_is_told(store: S3Store, proxy: FaultProxy) -> None:
    proxy.plan(fault_proxy.Answer(503, SLOW_DOWN), times=1000)
    for attempt in (
        store.get("main/a", limit=LIMIT),
        store.head("main/a"),
        store.put("main/a", b"a"),
        store.delete(["main/a"]),
        upload(store, "main/large"),
        store.sweep(older_than=0),
    ):
        with pytest.raises(StoreUnavailable, match="too many requests"):
            await attempt
    with pytest.raises(StoreUnavailable, match="too many requests"):
        [info async for info in store.list("")]


async def test_a_fault_never_means_that_there_is_nothing(store: S3Store, proxy: FaultProxy) -> None:
    await store.put("main/a", b"a")
    bodies = (b"", b"<html>not found</html>", b"<Error><Code>NoSuchBucket</Code></Error>")
    for status, body in [(403, b""), (503, b""), *((404, body) for body in bodies)]:
        proxy.calm()
        proxy.plan(fault_proxy.Answer(status, body), times=1000)
        for key in ("main/a", "main/not-there"):
            with pytest.raises(StoreError):
                await store.head(key)
            with pytest.raises(StoreError):
                await store.get(key, limit=LIMIT)


async def test_who_is_told_to_slow_down_does(store: S3Store, proxy: FaultProxy, limited: Limited) -> None:
    objects = {f"main/{n}": b"%d" % n for n in range(8)}
    await store.put_many(objects)
    assert limited.limit == 8
    proxy.plan(fault_proxy.Answer(503, SLOW_DOWN), method="GET", times=8)
    got = await asyncio.gather(*(store.get(key, limit=LIMIT) for key in objects))
    assert got == [*objects.values()]
    assert limited.limit < 8
    while limited.limit < 8:
        await asyncio.gather(*(store.get(key, limit=LIMIT) for key in objects))


@pytest.mark.parametrize("half", [False, True])
async def test_a_body_that_breaks_is_read_on_from_there(store: S3Store, proxy: FaultProxy, half: bool) -> None:
    await store.put("main/a", SMALL)
    for after in (0, 1, 2**20, 100):
        proxy.plan(fault_proxy.Truncate(after, half=half), method="GET")
    assert await whole(store.read("main/a")) == SMALL
    assert [seen.headers.get("Range") for seen in proxy.seen if seen.method == "GET"] == [
        None,
        f"bytes=0-{len(SMALL) - 1}",
        f"bytes=1-{len(SMALL) - 1}",
        f"bytes={2**20 + 1}-{len(SMALL) - 1}",
        f"bytes={2**20 + 101}-{len(SMALL) - 1}",
    ]
    proxy.plan(fault_proxy.Truncate(10, half=half), method="GET")
    assert await whole(store.read("main/a", ByteRange(5, 50))) == SMALL[5:50]
    proxy.plan(fault_proxy.Truncate(10, half=half), method="GET")
    assert await store.get("main/a", limit=LIMIT) == SMALL


async def test_a_body_that_always_breaks_never_looks_whole(store: S3Store, proxy: FaultProxy) -> None:
    await store.put("main/a", SMALL)
    proxy.plan(fault_proxy.Truncate(1000), method="GET", times=1000)
    received = bytearray()

    async def read() -> None:
        async for chunk in store.read("main/a"):
            received.extend(chunk)

    with pytest.raises(StoreUnavailable):
        await read()
    assert SMALL.startswith(received)
    assert len(received) < len(SMALL)
    with pytest.raises(StoreUnavailable):
        await store.get("main/a", limit=LIMIT)


async def test_what_is_replaced_while_it_is_read_is_not_mixed(store: S3Store, proxy: FaultProxy) -> None:
    await store.put("main/a", SMALL)
    proxy.plan(fault_proxy.Truncate(2**20), method="GET")
    chunks = store.read("main/a")
    await anext(chunks)
    await store.put("main/a", SMALL[::-1], replace=True)
    with pytest.raises(StoreError, match="another object"):
        await whole(chunks)


async def test_what_vanishes_while_it_is_read_has_not_ended(store: S3Store, proxy: FaultProxy) -> None:
    await store.put("main/a", SMALL)
    proxy.plan(fault_proxy.Truncate(2**20), method="GET")
    chunks = store.read("main/a")
    await anext(chunks)
    await store.delete(["main/a"])
    with pytest.raises(StoreError, match="it changed while it was read"):
        await whole(chunks)


async def test_a_stalled_body_is_given_up(store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_client, "_READ_TIMEOUT", 0.3)
    await store.put("main/a", SMALL)
    proxy.plan(fault_proxy.Stall(1000), method="GET")
    assert await whole(store.read("main/a")) == SMALL


async def test_an_upload_that_hangs_is_given_up(
    store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "_READ_TIMEOUT", 0.3)
    monkeypatch.setattr(s3_client, "_SLOWEST_UPLOAD", 2**30)
    await store.put("main/a", b"a")
    proxy.plan(fault_proxy.Hang(), method="PUT")
    assert await store.put("main/b", b"b")


@pytest.mark.parametrize("fault", [fault_proxy.CutRequest(2**20), fault_proxy.CutRequest(0)])
async def test_a_body_that_arrives_in_part_makes_no_object(
    store: S3Store, proxy: FaultProxy, gateway: Gateway, bucket: str, fault: fault_proxy.Fault
) -> None:
    await store.put("main/a", b"a")
    proxy.plan(fault, method="PUT", times=1000)
    with pytest.raises(StoreUnavailable):
        await store.put("main/b", SMALL)
    with pytest.raises(StoreUnavailable):
        await upload(store, "main/c")
    proxy.calm()
    assert [info.key async for info in store.list("")] == ["main/a"]
    assert "Uploads" not in gateway.client().list_multipart_uploads(Bucket=bucket, Prefix=store._prefix)


async def test_bytes_that_change_on_the_way_are_sent_again(store: S3Store, proxy: FaultProxy) -> None:
    await store.put("main/a", b"a")
    proxy.plan(fault_proxy.AlterRequest(1000), method="PUT")
    assert await store.put("main/b", SMALL)
    assert await store.get("main/b", limit=LIMIT) == SMALL
    proxy.plan(fault_proxy.AlterRequest(1000), method="PUT", query="partNumber")
    assert await upload(store, "main/c")
    assert await store.get("main/c", limit=LIMIT) == LARGE
    assert not proxy.waiting


async def test_a_writer_waits_while_its_parts_are_on_their_way(
    proxy: FaultProxy, gateway: Gateway, bucket: str
) -> None:
    """What is in memory is bounded: the parts on their way, and one that fills."""
    store = S3Store(
        bucket,
        requests=Direct(),
        endpoint=proxy.url,
        prefix=token_hex(8),
        session=gateway.session(),
        part_size=MIN_PART_SIZE,
        parts=2,
    )
    proxy.plan(fault_proxy.Hang(), method="PUT", query="partNumber", times=1000)
    taken = 0

    async def write() -> None:
        nonlocal taken
        async with store.writer("main/a") as writer:
            while True:
                await writer.write(bytes(2**20))
                taken += 2**20

    writing = asyncio.create_task(write())
    await until(lambda: proxy.count("PUT", query="partNumber") == 2 and taken >= 3 * MIN_PART_SIZE)
    await asyncio.sleep(0.2)  # for one too many
    assert proxy.count("PUT", query="partNumber") == 2
    assert taken == 3 * MIN_PART_SIZE
    writing.cancel()
    begun = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert time.monotonic() - begun < 10
    await store.close()


async def test_who_is_cancelled_does_not_wait_long(
    store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object that has left may take effect: it is waited for, but not until the connection times out."""
    monkeypatch.setattr(s3_client, "_GRACE", 0.5)
    await store.put("main/a", b"a")
    await store.head("main/a")
    proxy.plan(fault_proxy.Hang(), times=1000)
    attempts = [("PUT", 0.5, store.put("main/b", b"b")), ("GET", 0, store.get("main/a", limit=LIMIT))]
    for method, seconds, attempt in attempts:
        before, asking = proxy.count(method), asyncio.ensure_future(attempt)
        await until(lambda: proxy.count(method) > before)  # noqa: B023  it does not outlive the round
        begun = time.monotonic()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert seconds < time.monotonic() - begun < seconds + 10


IGNORANT = {
    "ignored": [fault_proxy.Answer(200, headers={"ETag": "x"})] * 2,
    "not-implemented": [fault_proxy.Answer(501, b"<Error><Code>NotImplemented</Code></Error>")],
    "refused": [fault_proxy.Answer(400, b"<Error><Code>InvalidArgument</Code></Error>")],
}


@pytest.mark.parametrize("answers", IGNORANT.values(), ids=IGNORANT)
async def test_without_the_help_of_the_endpoint(
    store: S3Store, proxy: FaultProxy, answers: list[fault_proxy.Fault]
) -> None:
    """If-None-Match on PUT is of no use here; the writers of one process manage all the same."""
    for answer in answers:
        proxy.plan(answer, method="PUT", path="/.cachesrv/probe")
    assert await store.put("main/a", b"a")
    assert not await store.put("main/a", b"b")
    assert await store.get("main/a", limit=LIMIT) == b"a"
    created = await asyncio.gather(*(store.put("main/b", b"%d" % n) for n in range(8)))
    assert created.count(True) == 1
    assert await store.get("main/b", limit=LIMIT) == b"%d" % created.index(True)
    contents = [bytes([n]) * (MIN_PART_SIZE + 1) for n in range(3)]
    created = await asyncio.gather(*(upload(store, "main/c", content) for content in contents))
    assert created.count(True) == 1
    assert await store.get("main/c", limit=LIMIT) == contents[created.index(True)]
    assert not proxy.waiting
    assert not any("If-None-Match" in seen.headers for seen in proxy.seen if seen.path.endswith(("main/a", "main/b")))


@pytest.mark.parametrize("status", [400, 501])
async def test_a_completion_that_takes_no_condition(store: S3Store, proxy: FaultProxy, status: int) -> None:
    proxy.plan(fault_proxy.Answer(status), method="POST", query="uploadId", path="/.cachesrv/probe")
    contents = [bytes([n]) * (MIN_PART_SIZE + 1) for n in range(3)]
    created = await asyncio.gather(*(upload(store, "main/a", content) for content in contents))
    assert created.count(True) == 1
    assert await store.get("main/a", limit=LIMIT) == contents[created.index(True)]
    assert not proxy.waiting


async def test_a_completion_that_takes_a_condition(store: S3Store, proxy: FaultProxy) -> None:
    """Where it does, nobody else has to be asked."""
    refused = fault_proxy.Answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
    proxy.plan(refused, method="POST", query="uploadId", path="/.cachesrv/probe")
    assert await upload(store, "main/a")
    assert not proxy.count(path="/.cachesrv/claims/")
    proxy.plan(refused, method="POST", query="uploadId", path="/main/a")
    assert not await upload(store, "main/a", SMALL + LARGE)
    assert await store.get("main/a", limit=LIMIT) == LARGE


async def test_a_piece_is_copied_as_a_whole_while_it_is_what_it_was(store: S3Store, proxy: FaultProxy) -> None:
    """S3 copies ranges of nothing that has 5 MB or less; and where it compares, it says what has been replaced."""
    key, digest = "~uploads/main/01/0123.staged", md5(SMALL).hexdigest()
    await store.put(key, SMALL)
    refused = fault_proxy.Answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
    proxy.plan(refused, method="PUT", query="partNumber")
    with pytest.raises(NotFound, match="replaced"):
        await store.direct.publish(key, "main/a", Piece(digest, digest))
    assert await store.head("main/a") is None

    assert await store.direct.publish(key, "main/a", Piece(digest, digest))
    assert await store.get("main/a", limit=LIMIT) == SMALL
    copies = [seen.headers for seen in proxy.seen if "x-amz-copy-source" in seen.headers]
    assert [headers["x-amz-copy-source-if-match"] for headers in copies] == [f'"{digest}"'] * 2
    assert not any("x-amz-copy-source-range" in headers for headers in copies)


async def test_whether_the_endpoint_helps_is_found_out_once(
    store: S3Store, proxy: FaultProxy, gateway: Gateway, bucket: str
) -> None:
    await store.put("main/a", b"a")
    await store.put("main/b", b"b")
    assert [seen.path.endswith("/.cachesrv/probe") for seen in proxy.seen] == [True, True, False, False]
    proxy.calm()
    prefix = store._prefix.removesuffix("/")
    again = S3Store(bucket, requests=Direct(), endpoint=proxy.url, prefix=prefix, session=gateway.session())
    assert not await again.put("main/a", b"b")
    assert [seen.path.endswith("/.cachesrv/probe") for seen in proxy.seen] == [True, False, False]
    await again.close()


async def test_requests_go_through_the_proxy_of_the_environment(
    proxy: FaultProxy, gateway: Gateway, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    store = S3Store(
        bucket, requests=Direct(), endpoint=gateway.endpoint, prefix=token_hex(8), session=gateway.session()
    )
    await store.put("main/a", b"a")
    assert await store.head("main/a") is not None
    assert await store.get("main/a", limit=LIMIT) == b"a"
    assert {seen.method for seen in proxy.seen} == {"PUT", "HEAD", "GET"}
    await store.close()


async def test_what_proxies_do_to_answers_is_noticed(store: S3Store, proxy: FaultProxy) -> None:
    await store.put("main/a", SMALL)
    proxy.plan(fault_proxy.Answer(200, SMALL, {"ETag": "x"}), method="GET")
    with pytest.raises(StoreError, match="a part was asked for"):
        await whole(store.read("main/a", ByteRange(5, 50)))
    proxy.plan(fault_proxy.Answer(206, SMALL[:10], {"ETag": "x", "Content-Range": "bytes 0-9/3145728"}), method="GET")
    with pytest.raises(StoreError, match="a part was asked for"):
        await whole(store.read("main/a", ByteRange(5, 15)))


async def test_an_upload_that_fails_for_good_leaves_no_parts(
    store: S3Store, proxy: FaultProxy, gateway: Gateway, bucket: str
) -> None:
    proxy.plan(fault_proxy.Drop(), method="PUT", query="partNumber", times=1000)
    with pytest.raises(StoreUnavailable):
        await upload(store, "main/a")
    assert "Uploads" not in gateway.client().list_multipart_uploads(Bucket=bucket, Prefix=store._prefix)


async def test_the_endpoint_that_is_away_and_comes_back(proxy: FaultProxy, gateway: Gateway, bucket: str) -> None:
    asked = 0

    def count(*_: object) -> None:
        nonlocal asked
        asked += 1

    guarded = Guarded(Measured(Direct(), count), patience=0.2, pause=0.1)
    store = S3Store(
        bucket,
        requests=Retrying(guarded, attempts=3, first=0.01),
        endpoint=proxy.url,
        prefix=token_hex(8),
        session=gateway.session(),
    )
    try:
        await store.put("main/a", b"a")
        proxy.down()
        deadline = time.monotonic() + 0.4
        while time.monotonic() < deadline:
            with pytest.raises(StoreUnavailable):
                await store.get("main/a", limit=LIMIT)
            with pytest.raises(StoreUnavailable):
                await store.head("main/a")
        begun, asked = time.monotonic(), 0
        for _ in range(50):
            with pytest.raises(StoreUnavailable):
                await store.get("main/a", limit=LIMIT)
        assert asked <= (time.monotonic() - begun) / 0.1 + 1
        proxy.up()
        await asyncio.sleep(0.15)
        assert await store.get("main/a", limit=LIMIT) == b"a"
    finally:
        await store.close()
