"""An object on its way out: from a file or as it comes, whole or in part."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from aiohttp import web

from cachesrv.errors import StoreError
from cachesrv.storage.base import ByteRange, FilePart
from cachesrv.web import ranges
from cachesrv.web.errors import BEGUN

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from typing import BinaryIO

    from cachesrv.storage.base import LocalFile

IMMUTABLE = "max-age=31536000, immutable"
"""Cache-Control of objects that never change under their name."""
REVALIDATE = "no-cache"
"""Cache-Control of objects that may be replaced."""

UNSENT = 64 * 1024
"""Bytes that may wait in a connection before it is held back, TLS or not."""
_SMALL = 256 * 1024
"""Bytes up to which a file leaves in one write."""
_TOGETHER = 128 * 1024
"""Bytes that are read at a time of a file that has to be encrypted."""
_VERY_SMALL = 16 * 1024
"""As much, when memory is dear."""

FRUGAL = web.RequestKey("frugal", bool)
"""Set in a request when many clients do not take their answers: this one must not lie in memory too."""


class Body(Protocol):
    """What is to be sent, whole or in part."""

    size: int

    async def begin(self, part: ByteRange, small: int) -> bytes | None:
        """The part, when it has at most `small` bytes; else None, and it can be sent. What fails here can be told."""

    async def send(self, request: web.Request, response: web.StreamResponse, part: ByteRange) -> None:
        """Write the part. Raises when it breaks off."""


async def send(
    request: web.Request, body: Body, *, content_type: str, cache_control: str, etag: str | None = None
) -> web.StreamResponse:
    """Answer a GET with the object, or the part of it that is asked for; `etag` is quoted."""
    headers = {"Content-Type": content_type, "Cache-Control": cache_control, "Accept-Ranges": "bytes"}
    return await _send_part(request, headers, body, etag)


def opened(file: LocalFile) -> FileBody | None:
    """A file to be sent, and closed; None when it has gone meanwhile. Raises StoreError.

    It has the size of what is opened: it may have been replaced since it was looked at.
    """
    try:
        return FileBody(Path(file.path).open("rb"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{file.path} cannot be read: {error.strerror}") from error


class BytesBody:
    """What lies in memory."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = data

    async def begin(self, part: ByteRange, small: int) -> bytes | None:
        """See Body."""
        return self._data[part.start : part.end] if part.length <= small else None

    async def send(self, _request: web.Request, response: web.StreamResponse, part: ByteRange) -> None:
        """See Body."""
        await response.write(self._data[part.start : part.end])


class SizeOnly:
    """The body of an answer to HEAD."""

    def __init__(self, size: int) -> None:
        self.size = size

    async def begin(self, _part: ByteRange, _small: int) -> bytes | None:
        """There is nothing to send."""
        return None

    async def send(self, _request: web.Request, _response: web.StreamResponse, _part: ByteRange) -> None:
        """There is nothing to send."""


class FileBody:
    """A context manager, that closes the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = os.fstat(file.fileno()).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    async def begin(self, part: ByteRange, small: int) -> bytes | None:
        """See Body."""
        if part.length > small:
            return None
        return await asyncio.to_thread(FilePart(self._file, part).read)

    async def send(self, request: web.Request, response: web.StreamResponse, part: ByteRange) -> None:
        """See Body."""
        await _send_file(request, response, self._file, part)


class ChunksBody:
    """What comes bit by bit: `read` gives the chunks of a part, or says in which file they lie. An asynchronous context
    manager, to be sent once.
    """

    def __init__(self, size: int, read: Callable[[ByteRange], AsyncIterator[bytes | FilePart]]) -> None:
        self.size = size
        self._read = read
        self._first: bytes | FilePart = b""
        self._chunks: AsyncIterator[bytes | FilePart] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Let go of what is read at once, however it ended."""
        if isinstance(self._chunks, AsyncGenerator):
            await self._chunks.aclose()

    async def begin(self, part: ByteRange, small: int) -> bytes | None:
        """See Body. Of a large part the first chunk is waited for."""
        if not part.length:
            return b""
        self._chunks = self._read(part)
        if part.length <= small:
            return b"".join([await _in_memory(chunk) async for chunk in self._chunks])
        self._first = await anext(self._chunks, b"")
        return None

    async def send(self, request: web.Request, response: web.StreamResponse, _part: ByteRange) -> None:
        """Pass it on as it comes."""
        assert self._chunks is not None
        await _send_chunk(request, response, self._first)
        async for chunk in self._chunks:
            await _send_chunk(request, response, chunk)


async def _send_chunk(request: web.Request, response: web.StreamResponse, chunk: bytes | FilePart) -> None:
    if isinstance(chunk, FilePart):
        await _send_file(request, response, chunk.file, chunk.part)
    else:
        await response.write(chunk)


async def _in_memory(chunk: bytes | FilePart) -> bytes:
    return await asyncio.to_thread(chunk.read) if isinstance(chunk, FilePart) else chunk


async def _send_file(request: web.Request, response: web.StreamResponse, file: BinaryIO, part: ByteRange) -> None:
    """Let the kernel copy a part of a file, unless it has to be encrypted."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client has gone")
    if transport.get_extra_info("sslcontext") is not None:
        # The event loop's own way, 16 KiB a time, loses count of what waits, and fails when the client goes.
        for start in range(part.start, part.end, _TOGETHER):
            piece = ByteRange(start, min(start + _TOGETHER, part.end))
            await response.write(await asyncio.to_thread(FilePart(file, piece).read))
        return
    # What was written before has to be taken first: the event loop does not bear that a client goes while it waits for
    # that itself.
    transport.set_write_buffer_limits(0)
    await request.writer.drain()
    transport.set_write_buffer_limits(UNSENT)
    if transport.is_closing():
        raise ConnectionResetError("the client has gone")
    sent = await asyncio.get_running_loop().sendfile(transport, file, part.start, part.length)
    if sent != part.length:
        raise StoreError(f"{file.name} has become shorter")


async def _send_part(request: web.Request, headers: dict[str, str], body: Body, etag: str | None) -> web.StreamResponse:
    if etag:
        headers["ETag"] = etag
        if ranges.matches(request.headers.get("If-None-Match"), etag):
            return web.Response(status=304, headers=headers)
    part = None
    # For other methods than GET, ranges mean nothing. Source: RFC 9110, 14.2.
    if request.method == "GET" and ranges.range_holds(request.headers.get("If-Range"), etag):
        part = ranges.requested(request.headers.get("Range"), body.size)
    if part is not None:
        headers["Content-Range"] = f"bytes {part.start}-{part.end - 1}/{body.size}"
    return await _send_bytes(request, 200 if part is None else 206, headers, body, part or ByteRange(0, body.size))


async def _send_bytes(
    request: web.Request, status: int, headers: dict[str, str], body: Body, part: ByteRange
) -> web.StreamResponse:
    if request.method == "HEAD":
        return web.Response(status=status, headers={**headers, "Content-Length": str(part.length)})
    data = await body.begin(part, _VERY_SMALL if request.get(FRUGAL) else _SMALL)
    if data is not None:
        return web.Response(status=status, headers=headers, body=data)
    response = web.StreamResponse(status=status, headers=headers)
    response.content_length = part.length
    request[BEGUN] = True
    await response.prepare(request)
    await body.send(request, response, part)
    await response.write_eof()
    return response
