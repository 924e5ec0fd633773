"""Somebody else's cache over HTTP: what is an answer, what an absence, and what neither."""

from __future__ import annotations

import asyncio
import gzip
import time
from email.utils import formatdate
from typing import TYPE_CHECKING

import aiohttp
import pytest

from cachesrv.errors import PeerError, PeerUnavailable
from cachesrv.services.http_reader import HttpReader
from tests.fake_upstream import FakeUpstream, cut, drop, hang, sent, status, trickling, unsized

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.fake_upstream import Fault

LARGE = bytes(range(256)) * 4000
TIMEOUT = 0.3


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as upstream:
        upstream.objects |= {"x.narinfo": b"narinfo", "nar/x": LARGE}
        yield upstream


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
def reader(upstream: FakeUpstream, session: aiohttp.ClientSession) -> HttpReader:
    return HttpReader(session, upstream.url, timeout=TIMEOUT)


async def read(reader: HttpReader, name: str = "nar/x", start: int = 0) -> bytes:
    return b"".join([chunk async for chunk in reader.read(name, start)])


async def test_what_is_there_is_read(reader: HttpReader, upstream: FakeUpstream) -> None:
    assert await reader.get("x.narinfo", 100) == b"narinfo"
    assert await reader.size("nar/x") == len(LARGE)
    assert await read(reader) == LARGE
    assert await read(reader, start=1000) == LARGE[1000:]
    assert upstream.asked_from[-1] == 1000


@pytest.mark.parametrize("slash", ["", "/", "//"])
async def test_a_cache_may_be_below_a_path(upstream: FakeUpstream, session: aiohttp.ClientSession, slash: str) -> None:
    upstream.objects["team/main/x.narinfo"] = b"below"
    reader = HttpReader(session, f"{upstream.url}/team/main{slash}", timeout=TIMEOUT)
    assert await reader.get("x.narinfo", 100) == b"below"


@pytest.mark.parametrize("number", [404, 410])
async def test_what_is_said_not_to_be_there_is_not(reader: HttpReader, upstream: FakeUpstream, number: int) -> None:
    upstream.fail("x", *[status(number)] * 3)
    assert await reader.get("x", 100) is None
    assert await reader.size("x") is None
    with pytest.raises(PeerError, match=str(number)) as failure:
        await read(reader, "x")
    assert not isinstance(failure.value, PeerUnavailable)


@pytest.mark.parametrize("number", [204, 304, 400, 401, 403, 405, 451])
async def test_other_answers_are_no_absence(reader: HttpReader, upstream: FakeUpstream, number: int) -> None:
    for call in (lambda: reader.get("x", 100), lambda: reader.size("x"), lambda: read(reader, "x")):
        upstream.fail("x", status(number))
        with pytest.raises(PeerError, match=f"it answered {number}") as failure:
            await call()
        assert not isinstance(failure.value, PeerUnavailable)


@pytest.mark.parametrize("number", [408, 425, 429, 500, 502, 503, 504, 520])
async def test_an_answer_that_may_pass_is_told_from_one_that_does_not(
    reader: HttpReader, upstream: FakeUpstream, number: int
) -> None:
    for call in (lambda: reader.get("x", 100), lambda: reader.size("x"), lambda: read(reader, "x")):
        upstream.fail("x", status(number, Retry_After="7"))
        with pytest.raises(PeerUnavailable, match=f"it answered {number}") as failure:
            await call()
        assert failure.value.after == 7


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("120", 120, 120),
        ("0", 0, 0),
        ("", 0, 0),
        ("soon", 0, 0),
        ("-1", 0, 0),
        ("1.5", 0, 0),
        ("²", 0, 0),
        ("9" * 50, 999_999_999, 999_999_999),
        (600, 500, 600),
        (-600, 0, 0),
        ("Mon, 99 Foo 2020 00:00:00 GMT", 0, 0),
    ],
)
async def test_how_long_it_wants_to_be_left_alone(
    reader: HttpReader, upstream: FakeUpstream, text: str | int, low: float, high: float
) -> None:
    """A number stands for the date so many seconds from now."""
    after = text if isinstance(text, str) else formatdate(time.time() + text, usegmt=True)
    upstream.fail("x", status(503, Retry_After=after))
    with pytest.raises(PeerUnavailable) as failure:
        await reader.get("x", 100)
    assert low <= failure.value.after <= high


@pytest.mark.parametrize(
    ("fault", "text"),
    [(hang, "did not answer within 0.3 s"), (drop, "disconnected"), (cut(bytes(50), 10), "payload")],
)
async def test_no_answer_is_no_absence(reader: HttpReader, upstream: FakeUpstream, fault: Fault, text: str) -> None:
    upstream.fail("x", *[fault] * 9)  # the client itself asks again when a connection that it had was closed
    with pytest.raises(PeerUnavailable, match=f"(?i){text}"):
        await reader.get("x", 100)
    with pytest.raises(PeerUnavailable, match=f"(?i){text}"):
        await read(reader, "x")


async def test_who_is_not_there_is_no_absence(session: aiohttp.ClientSession) -> None:
    reader = HttpReader(session, "http://127.0.0.1:1", timeout=TIMEOUT)
    with pytest.raises(PeerUnavailable, match=r"127\.0\.0\.1:1"):
        await reader.get("x", 100)


async def test_an_answer_has_an_end(reader: HttpReader, upstream: FakeUpstream) -> None:
    """In bytes, also once they are decompressed, and in time, however it trickles."""
    upstream.objects["x"] = bytes(101)
    with pytest.raises(PeerError, match="more than 100 bytes"):
        await reader.get("x", 100)
    upstream.fail("x", sent(gzip.compress(bytes(10**8)), Content_Encoding="gzip"))
    with pytest.raises(PeerError, match="more than 1000 bytes"):
        await reader.get("x", 1000)
    upstream.fail("x", trickling(bytes(100), 0.05))
    with pytest.raises(PeerUnavailable, match="did not answer within"):
        await reader.get("x", 100)


async def test_a_transfer_that_does_not_come_forward_ends(reader: HttpReader, upstream: FakeUpstream) -> None:
    upstream.fail("nar/x", trickling(bytes(1000), 0.01))
    with pytest.raises(PeerUnavailable, match="did not answer within"):
        await read(reader)


async def test_who_reads_slowly_has_time(reader: HttpReader) -> None:
    data = b""
    async for chunk in reader.read("nar/x", 0):
        data += chunk
        await asyncio.sleep(TIMEOUT / 4)
    assert data == LARGE


async def test_a_server_without_ranges_is_read_from_the_start(session: aiohttp.ClientSession) -> None:
    async with FakeUpstream(ranges=False) as upstream:
        upstream.objects["nar/x"] = LARGE
        reader = HttpReader(session, upstream.url, timeout=TIMEOUT)
        for start in (1, 300_000, len(LARGE) - 1):
            assert await read(reader, start=start) == LARGE[start:]
        assert await read(reader, start=len(LARGE)) == b""


@pytest.mark.parametrize("content_range", ["bytes 5-9/100", "bytes */100", "items 1-2/3", ""])
async def test_other_bytes_than_were_asked_for_are_refused(
    reader: HttpReader, upstream: FakeUpstream, content_range: str
) -> None:
    upstream.fail("nar/x", status(206, Content_Range=content_range))
    with pytest.raises(PeerError, match="from 3 on, and sent others"):
        await read(reader, start=3)


async def test_more_than_was_asked_for_is_skipped(reader: HttpReader, upstream: FakeUpstream) -> None:
    async def early(_request: aiohttp.web.Request) -> aiohttp.web.StreamResponse:
        return aiohttp.web.Response(status=206, body=b"123456789", headers={"Content-Range": "bytes 1-9/10"})

    upstream.fail("nar/x", early)
    assert await read(reader, start=3) == b"3456789"


async def test_a_redirect_is_followed(reader: HttpReader, upstream: FakeUpstream) -> None:
    upstream.objects["elsewhere"] = LARGE
    upstream.fail("nar/x", *[status(307, Location="/elsewhere")] * 3)
    assert await read(reader) == LARGE
    assert await read(reader, start=10) == LARGE[10:]
    assert await reader.size("nar/x") == len(LARGE)
    upstream.fail("loop", *[status(302, Location="/loop")] * 50)
    with pytest.raises(PeerError):
        await reader.get("loop", 100)


async def test_a_size_that_nobody_says_is_none(reader: HttpReader, upstream: FakeUpstream) -> None:
    upstream.fail("nar/x", unsized(LARGE), unsized(LARGE))
    assert await reader.size("nar/x") is None
    assert await read(reader) == LARGE


async def test_urls_are_asked_for_as_they_stand(reader: HttpReader, upstream: FakeUpstream) -> None:
    upstream.objects["nar/a+b!c%d.nar"] = b"odd"
    assert await read(reader, "nar/a+b!c%25d.nar?hash=1&x=%2F") == b"odd"
    assert await read(reader, f"{upstream.url}/x.narinfo") == b"narinfo"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "http://", "http://[", "http://x:99999999/"])
async def test_urls_that_lead_nowhere_are_named(reader: HttpReader, url: str) -> None:
    with pytest.raises(PeerError):
        await read(reader, url)


async def test_who_stops_reading_leaves_no_connection(
    reader: HttpReader, session: aiohttp.ClientSession, upstream: FakeUpstream
) -> None:
    chunks = reader.read("nar/x", 0)
    await anext(chunks)
    await chunks.aclose()
    assert isinstance(session.connector, aiohttp.TCPConnector)
    assert not session.connector._acquired
