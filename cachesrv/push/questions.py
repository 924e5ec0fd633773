"""One question over HTTP, by what asyncio has: a push that finds everything there has nothing else to say, and to load
a whole HTTP library for it would take longer than all the rest.

A connection is made for each question and closed after it. No proxies, no redirects, no compression of the answer.
Source: RFC 9112.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cachesrv.errors import BadInput, ServerError
from cachesrv.push.connection import USER_AGENT, tls
from cachesrv.push.retry import Broken, Unreachable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Mapping

    from cachesrv.push.address import Address
    from cachesrv.push.connection import Timeouts

_HEAD_LIMIT = 64 * 1024
_PIECE = 256 * 1024
_NEXT_ADDRESS = 0.25
"""Seconds that one of several addresses has before the next one is tried as well, as in RFC 8305."""
_match_status = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])(?: [^\r\n]*)?\r?\n").fullmatch
_match_size = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r?\n").fullmatch


@dataclass(frozen=True, slots=True)
class Said:
    """An answer; names of `headers` are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Questions:
    """To the server at an address; answers have at most `limit` bytes. Raises ConfigError when the authorities'
    certificates cannot be read.
    """

    def __init__(self, address: Address, timeouts: Timeouts, *, limit: int) -> None:
        self._address = address
        self._timeouts = timeouts
        self._limit = limit
        self._tls = tls(os.environ) if address.origin[0] == "https" else None

    async def ask(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> Said:
        """What is answered. Raises Broken, Unreachable, ServerError."""
        try:
            async with self._connected() as (reader, writer):
                async with asyncio.timeout(self._timeouts.answer):
                    writer.write(_request(method, url, headers, body))
                    await writer.drain()
                return await _Answer(reader, self._timeouts.answer, self._limit).read()
        except TimeoutError as error:
            raise Broken(f"{self._address} has gone silent") from error
        except (asyncio.IncompleteReadError, OSError) as error:
            raise Broken(f"the connection to {self._address} broke ({type(error).__name__})") from error
        except (BadInput, asyncio.LimitOverrunError) as error:
            raise ServerError(f"{self._address} does not speak HTTP as expected: {error}") from error

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        _, host, port = self._address.origin
        try:
            async with asyncio.timeout(self._timeouts.connect):
                reader, writer = await asyncio.open_connection(
                    host, port, ssl=self._tls, limit=_HEAD_LIMIT, happy_eyeballs_delay=_NEXT_ADDRESS
                )
        except TimeoutError as error:
            raise Unreachable(f"{self._address} cannot be reached: it does not answer to a connection") from error
        except ssl.SSLError as error:
            raise ServerError(f"no TLS connection to {self._address}: {_tls_reason(error)}") from error
        except OSError as error:
            raise Unreachable(f"{self._address} cannot be reached: {_reason(error)}") from error
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


def _request(method: str, url: str, headers: Mapping[str, str], body: bytes) -> bytes:
    parts = urlsplit(url)
    lines = [f"{method} {parts.path or '/'} HTTP/1.1", f"Host: {parts.netloc}", f"User-Agent: {USER_AGENT}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body or method != "GET":
        lines.append(f"Content-Length: {len(body)}")
    lines += ["Connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


class _Answer:
    """Reads one; what comes has to go on coming."""

    def __init__(self, reader: asyncio.StreamReader, patience: float, limit: int) -> None:
        self._reader = reader
        self._patience = patience
        self._limit = limit

    async def read(self) -> Said:
        status, headers = await self._head()
        while 100 <= status < 200:
            status, headers = await self._head()
        if status in (204, 304):
            body = b""
        elif "chunked" in headers.get("transfer-encoding", "").lower():
            body = await self._chunks()
        elif "content-length" in headers:
            body = await self._exactly(_length(headers["content-length"]))
        else:
            body = await self._to_the_end()
        return Said(status, headers, body)

    async def _head(self) -> tuple[int, dict[str, str]]:
        first = await self._until(b"\n")
        status = _match_status(first)
        if status is None:
            raise BadInput(f"an answer begins with {first[:40]!r}")
        headers: dict[str, str] = {}
        size = 0
        while line := (await self._until(b"\n")).rstrip(b"\r\n"):
            name, colon, value = line.decode("latin-1").partition(":")
            size += len(line)
            if not colon or size > _HEAD_LIMIT:
                raise BadInput(f"a header is {line[:40]!r}")
            headers[name.lower()] = value.strip()
        return int(status[1]), headers

    async def _chunks(self) -> bytes:
        body = bytearray()
        while True:
            size = _match_size(await self._until(b"\n"))
            if size is None:
                raise BadInput("the size of a chunk is none")
            length = int(size[1], 16)
            if not length:
                return bytes(body)  # what may follow says nothing about the body
            self._check(len(body) + length)
            body += await self._exactly(length)
            await self._exactly(2)

    async def _to_the_end(self) -> bytes:
        body = bytearray()
        while piece := await self._within(self._reader.read(_PIECE)):
            body += piece
            self._check(len(body))
        return bytes(body)

    async def _exactly(self, length: int) -> bytes:
        self._check(length)
        body = bytearray()
        while len(body) < length:
            piece = await self._within(self._reader.read(min(_PIECE, length - len(body))))
            if not piece:
                raise asyncio.IncompleteReadError(bytes(body[:100]), length)
            body += piece
        return bytes(body)

    async def _until(self, end: bytes) -> bytes:
        return await self._within(self._reader.readuntil(end))

    async def _within(self, reading: Coroutine[None, None, bytes]) -> bytes:
        async with asyncio.timeout(self._patience):
            return await reading

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise BadInput(f"an answer of more than {self._limit} bytes")


def _length(value: str) -> int:
    if not (value.isascii() and value.isdecimal() and len(value) < 19):
        raise BadInput(f"Content-Length is {value[:40]!r}")
    return int(value)


def _reason(error: OSError) -> str:
    """The system's words; those of asyncio name nothing but the address."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return str(error.strerror or error)  # of the resolver, whose numbers are negative


def _tls_reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{error.verify_message} (set SSL_CERT_FILE when the authority is your own)"
    return str(error.reason or error)
