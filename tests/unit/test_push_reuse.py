"""Connections that the other side closes while nothing is on them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, closing, suppress
from typing import TYPE_CHECKING

import aiohttp
import pytest

from cachesrv.push.reuse import Connections

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from cachesrv.push.reuse import Sending

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no"
CLOSED = b""


@asynccontextmanager
async def answering(answers: Sequence[bytes], asked: list[tuple[int, str]]) -> AsyncIterator[str]:
    """A server that gives these answers, and ends a connection after each that is not OK. `asked` has the bodies, each
    with the number of its connection.
    """
    left, connections = list(answers), 0
    serving: set[asyncio.Task[None]] = set()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        serving.add(asyncio.create_task(serve(connections, reader, writer)))

    async def serve(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(asyncio.IncompleteReadError, ConnectionError):
            answer = OK
            while answer == OK:
                await reader.readuntil(b"\r\n\r\n")
                asked.append((number, (await reader.readexactly(4)).decode()))
                answer = left.pop(0)
                writer.write(answer)

    async with await asyncio.start_server(begin, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        await asyncio.sleep(0)  # connections close in the next round of the loop


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connections]:
    connections = Connections(url, 2)
    try:
        yield connections
    finally:
        await connections.close()


class Post:
    """A request whose body is made when it is sent."""

    def __init__(self, url: str, text: str) -> None:
        self._url = url
        self._text = text

    async def __call__(self, session: aiohttp.ClientSession, sending: Sending) -> bytes:
        async with session.post(
            self._url, data=self._body(), headers={"Content-Length": "4"}, trace_request_ctx=sending
        ) as response:
            return await response.read()

    async def _body(self) -> AsyncIterator[bytes]:
        for letter in self._text:
            yield letter.encode()


async def test_what_comes_too_late_is_sent_again() -> None:
    """Whole, and on a new connection, though there is another one that is kept."""
    asked: list[tuple[int, str]] = []
    async with answering([OK, OK, CLOSED, OK], asked) as url, connected(url) as connections:
        await asyncio.gather(connections.send(Post(url, "one.")), connections.send(Post(url, "two.")))
        assert await connections.send(Post(url, "late")) == b"ok"

    assert [text for _, text in asked[2:]] == ["late", "late"]
    assert [number for number, _ in asked[2:]] in ([1, 3], [2, 3])


async def test_it_is_sent_again_only_once() -> None:
    asked: list[tuple[int, str]] = []
    async with answering([OK, CLOSED, CLOSED, OK], asked) as url, connected(url) as connections:
        await connections.send(Post(url, "one."))
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await connections.send(Post(url, "late"))

    assert asked == [(1, "one."), (1, "late"), (2, "late")]


async def test_a_new_connection_that_breaks_is_a_failure() -> None:
    asked: list[tuple[int, str]] = []
    async with answering([CLOSED, OK], asked) as url, connected(url) as connections:
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await connections.send(Post(url, "one."))

    assert asked == [(1, "one.")]


async def test_an_answer_that_breaks_off_is_a_failure() -> None:
    asked: list[tuple[int, str]] = []
    async with answering([OK, HALF, OK], asked) as url, connected(url) as connections:
        await connections.send(Post(url, "one."))
        with pytest.raises(aiohttp.ClientPayloadError):
            await connections.send(Post(url, "two."))

    assert asked == [(1, "one."), (1, "two.")]


async def test_a_body_that_is_gone_is_not_sent_again() -> None:
    asked: list[tuple[int, str]] = []
    async with answering([OK, CLOSED, OK], asked) as url, connected(url) as connections:
        await connections.send(Post(url, "one."))
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await connections.send_once(Post(url, "late"))

    assert asked == [(1, "one."), (1, "late")]
