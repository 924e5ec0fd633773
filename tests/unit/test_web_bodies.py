"""Request bodies: with an end, at a pace, decoded."""

from __future__ import annotations

import asyncio
import gzip
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import zstandard
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from cachesrv.errors import BadInput
from cachesrv.web import bodies
from cachesrv.web.errors import BodyTooSlow, UnknownCoding
from tests.waiting import let_pass, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Handler = Callable[[web.Request], Awaitable[bytes]]
    Address = tuple[str, int]

LIMIT = 1000
PATIENT = 60.0


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Address]:
    """A server with this one handler; an error of the handler is answered with its name."""

    async def handle(request: web.BaseRequest) -> web.Response:
        assert isinstance(request, web.Request)
        try:
            return web.Response(body=await handler(request))
        except (BadInput, BodyTooSlow) as error:
            return web.Response(status=400, text=type(error).__name__)

    async def wait(_request: web.Request) -> None:
        """As in the application: the body is asked for by those who read it."""

    app = web.Application()
    app.router.add_route("*", "/", handle, expect_handler=wait)
    runner = web.AppRunner(app, access_log=None, auto_decompress=False, shutdown_timeout=0)
    await runner.setup()
    assert runner.server is not None
    server = await asyncio.get_running_loop().create_server(runner.server, "127.0.0.1", 0)

    try:
        yield server.sockets[0].getsockname()
    finally:
        server.close()
        await runner.cleanup()


@asynccontextmanager
async def connected(address: Address) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(*address)
    try:
        async with asyncio.timeout(PATIENT):
            yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()


async def answer(reader: asyncio.StreamReader) -> bytes:
    """The body of an answer; of an interim one, its head."""
    head = await reader.readuntil(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 100 "):
        return head
    return await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))


async def exchange(address: Address, data: bytes) -> bytes:
    async with connected(address) as (reader, writer):
        writer.write(data)
        return await answer(reader)


def put(body: bytes, *fields: str, length: int | None = None) -> bytes:
    stated = len(body) if length is None else length
    return "\r\n".join(("PUT / HTTP/1.1", "Host: x", f"Content-Length: {stated}", *fields, "", "")).encode() + body


def chunked(*pieces: bytes) -> bytes:
    head = b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b""))


async def whole(request: web.Request) -> bytes:
    return await bodies.whole(request, LIMIT, PATIENT)


ENCODED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "identity": bytes,
    "": bytes,
}


@pytest.mark.parametrize("coding", ENCODED)
async def test_whole_bodies(coding: str) -> None:
    async with serving(whole) as server:
        for body in (b"", b"body", b"x" * LIMIT):
            encoded = ENCODED[coding](body)
            assert await exchange(server, put(encoded, f"Content-Encoding: {coding}")) == body
        assert await exchange(server, put(b"body")) == b"body"
        assert await exchange(server, chunked(b"bo", b"dy")) == b"body"
        assert await exchange(server, chunked()) == b""


async def test_bodies_that_are_too_large() -> None:
    async with serving(whole) as server:
        assert await exchange(server, put(b"x" * (LIMIT + 1))) == b"TooLarge"
        assert await exchange(server, put(b"", length=LIMIT + 1)) == b"TooLarge", "by its length alone"
        assert await exchange(server, chunked(b"x" * LIMIT, b"x")) == b"TooLarge"
        for coding in ("gzip", "zstd"):
            bomb = ENCODED[coding](b"x" * 500_000)
            assert len(bomb) < LIMIT
            assert await exchange(server, put(bomb, f"Content-Encoding: {coding}")) == b"TooLarge"


async def test_codings_that_are_none() -> None:
    async with serving(whole) as server:
        for coding in ("unheard", "gzip, gzip", "gzip;q=1"):
            assert await exchange(server, put(b"body", f"Content-Encoding: {coding}")) == b"UnknownCoding"
        assert await exchange(server, put(b"garbage", "Content-Encoding: gzip")) == b"BadInput"
        assert await exchange(server, put(gzip.compress(b"body")[:-1], "Content-Encoding: gzip")) == b"BadInput"


async def test_a_body_is_asked_for_when_it_is_read() -> None:
    async with serving(whole) as server:
        head = put(b"", "Expect: 100-continue", length=4)
        assert await exchange(server, head) == b"HTTP/1.1 100 Continue\r\n\r\n"
        too_large = put(b"", "Expect: 100-continue", length=LIMIT + 1)
        assert await exchange(server, too_large) == b"TooLarge", "nobody is asked for what is not taken"


async def test_what_does_not_wait_is_not_told_to_go_on() -> None:
    async with serving(whole) as server:
        assert await exchange(server, put(b"body", "Expect: something")) == b"body"
        old = put(b"body", "Expect: 100-continue").replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", 1)
        assert await exchange(server, old) == b"body"


@pytest.mark.parametrize("sent", [0, 100])
async def test_bodies_that_do_not_come_forward(sent: int) -> None:
    async def impatient(request: web.Request) -> bytes:
        return await bodies.whole(request, 100_000, 0.05)

    async with serving(impatient) as server:
        assert await exchange(server, put(b"x" * sent, length=50_000)) == b"BodyTooSlow"


async def test_slow_but_steady_bodies_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time-out is for each part of the body, not for the whole."""
    monkeypatch.setattr(bodies, "_PACE_BYTES", 10)
    received = bytearray()

    async def read(request: web.Request) -> bytes:
        async for chunk in bodies.chunks(request, PATIENT / 2):
            received.extend(chunk)
        return bytes(received)

    async with serving(read) as server, connected(server) as (reader, writer):
        writer.write(put(b"", length=150))
        for number in range(15):
            writer.write(b"0123456789")
            await until(lambda: len(received) == 10 * (number + 1))  # noqa: B023  it does not outlive the round
            let_pass(PATIENT / 20)
        assert await answer(reader) == b"0123456789" * 15


async def test_decoded_bodies_of_any_size() -> None:
    async def read(request: web.Request) -> bytes:
        return b"".join([chunk async for chunk in bodies.decoded(request, LIMIT, PATIENT)])

    async with serving(read) as server:
        large = b"x" * 50 * LIMIT
        assert await exchange(server, put(large)) == large
        assert await exchange(server, put(gzip.compress(b"body"), "Content-Encoding: gzip")) == b"body"
        assert await exchange(server, put(gzip.compress(large), "Content-Encoding: gzip")) == b"TooLarge"


def test_names_of_codings() -> None:
    for name, compression in (("", "none"), ("identity", "none"), ("gzip", "gzip"), ("x-gzip", "gzip"), ("br", "br")):
        request = make_mocked_request("PUT", "/", headers={"Content-Encoding": name})
        assert bodies.coding(request) == compression
    with pytest.raises(UnknownCoding) as caught:
        bodies.coding(make_mocked_request("PUT", "/", headers={"Content-Encoding": "x" * 1000}))
    assert len(str(caught.value)) < 200
