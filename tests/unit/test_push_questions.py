"""One question over HTTP without a library: whatever the other side says has an outcome."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import asynccontextmanager, closing, suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachesrv.errors import BadInput, CachesrvError, ServerError
from cachesrv.push.address import Address
from cachesrv.push.connection import may_need_proxy
from cachesrv.push.questions import Questions, Said, _Answer
from cachesrv.push.retry import Broken, Unreachable
from tests.push_doubles import HURRY, PLENTY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

LIMIT = 1000


@asynccontextmanager
async def saying(pieces: Sequence[bytes], *, then_wait: bool = False) -> AsyncIterator[tuple[Address, list[bytes]]]:
    """A server that says this, whatever it is asked; and what it was asked."""
    asked: list[bytes] = []
    leave = asyncio.Event()

    answering: list[asyncio.Task[None]] = []

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.append(asyncio.create_task(answer(reader, writer)))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError), closing(writer):
            await say(reader, writer)

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next((line for line in head.split(b"\r\n") if line.startswith(b"Content-Length")), b": 0")
        asked.append(head + await reader.readexactly(int(length.partition(b": ")[2])))
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        if then_wait:
            await leave.wait()

    server = await asyncio.start_server(begin, "127.0.0.1", 0)
    async with server:
        yield Address.parse(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/main"), asked
        leave.set()
        await asyncio.gather(*answering)


async def ask(*pieces: bytes, body: bytes = b"", then_wait: bool = False) -> Said:
    async with saying(pieces, then_wait=then_wait) as (address, _):
        questions = Questions(address, HURRY if then_wait else PLENTY, limit=LIMIT)
        return await questions.ask("POST", address.api("missing"), {"Accept": "application/json"}, body)


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", 200, b"hello"),
        (b"HTTP/1.1 200\r\ncontent-length:5\r\n\r\nhello, and more", 200, b"hello"),
        (b"HTTP/1.0 404 Not Found\r\nX: y\r\n\r\nuntil the end", 404, b"until the end"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\n\r\n", 200, b"hello"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\nHTTP/1.1 204 Done\r\n\r\n", 204, b""),
        (b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok", 200, b"ok"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, b""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + bytes(1000), 200, bytes(1000)),
    ],
)
async def test_answers(answer: bytes, status: int, body: bytes) -> None:
    for pieces in ((answer,), [answer[place : place + 1] for place in range(min(len(answer), 150))] + [answer[150:]]):
        said = await ask(*pieces)
        assert (said.status, said.body) == (status, body)


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (b"", Broken, "broke"),
        (b"HTTP/1.1 200 O", Broken, "broke"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", Broken, "broke"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello", Broken, "broke"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", Broken, "broke"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", Broken, "broke"),
        (b"220 mail.example.org ESMTP\r\n", ServerError, "does not speak HTTP"),
        (b"HTTP/2 200\r\n\r\n", ServerError, "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nno header\r\n\r\n", ServerError, "header"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: five\r\n\r\nhello", ServerError, "Content-Length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n", ServerError, "more than 1000"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(1001), ServerError, "more than 1000"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", ServerError, "chunk"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n", ServerError, "more than 1000"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000, ServerError, "header"),
        (b"HTTP/1.1 200 OK\r\nx: " + bytes(100_000), ServerError, "does not speak HTTP"),
    ],
)
async def test_what_is_no_answer(answer: bytes, kind: type[CachesrvError], text: str) -> None:
    with pytest.raises(kind, match=text) as caught:
        await ask(answer)
    assert type(caught.value) is kind


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel"])
async def test_one_that_goes_silent_is_left(answer: bytes) -> None:
    with pytest.raises(Broken, match="gone silent"):
        await ask(answer, then_wait=True)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 60))
def test_any_bytes_have_an_outcome(noise: bytes, position: int) -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n0\r\n\r\n"

    async def read(said: bytes) -> None:
        reader = asyncio.StreamReader(limit=LIMIT)
        reader.feed_data(said)
        reader.feed_eof()
        with suppress(BadInput, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            await _Answer(reader, 5, LIMIT).read()

    for said in (noise, answer[:position] + noise + answer[position:]):
        asyncio.run(read(said))


async def test_the_question_as_it_goes_over_the_wire() -> None:
    async with saying([b"HTTP/1.1 204 Done\r\n\r\n"]) as (address, asked):
        questions = Questions(address, PLENTY, limit=LIMIT)
        await questions.ask("GET", address.api(), {"Authorization": "Bearer x"}, b"")
        await questions.ask("POST", address.api("missing"), {"Content-Type": "text/plain"}, b"body")
        host = address.base.removeprefix("http://").encode()
    assert asked == [
        b"GET /api/v1/caches/main HTTP/1.1\r\nHost: " + host + b"\r\nUser-Agent: cachesrv-push\r\n"
        b"Authorization: Bearer x\r\nConnection: close\r\n\r\n",
        b"POST /api/v1/caches/main/missing HTTP/1.1\r\nHost: " + host + b"\r\nUser-Agent: cachesrv-push\r\n"
        b"Content-Type: text/plain\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbody",
    ]


async def test_nobody_there() -> None:
    async with saying([]) as (address, _):
        pass
    with pytest.raises(Unreachable, match="cannot be reached: Connection refused"):
        await Questions(address, PLENTY, limit=LIMIT).ask("GET", address.api(), {}, b"")


def test_proxies_are_for_the_library() -> None:
    assert may_need_proxy({"http_proxy": "x"})
    assert may_need_proxy({"ALL_PROXY": "x"})
    assert not may_need_proxy({"http_proxy": "", "PROXY": "x", "HOME": "/"})


def test_the_library_is_not_loaded_for_a_question() -> None:
    """Nor is what sends: it would take longer than all the rest of a push that finds everything there."""
    code = "import sys; import cachesrv.push.run; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "cachesrv.push.questions" in loaded
    assert not {"aiohttp", "urllib.request", "http.client", "sqlite3", "cachesrv.push.carrying_out"} & set(loaded)
