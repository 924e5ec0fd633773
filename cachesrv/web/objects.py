"""An object on its way out: from a file or as it comes, whole or in part."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from aiohttp import web

from cachesrv.errors import NotFound, StoreError
from cachesrv.storage.base import ByteRange
from cachesrv.web import ranges
from cachesrv.web.errors import BEGUN

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from typing import BinaryIO

    from cachesrv.storage.base import LocalFile

IMMUTABLE = "max-age=31536000, immutable"
"""Cache-Control of objects that never change under their name."""
REVALIDATE = "no-cache"
"""Cache-Control of objects that may be replaced."""

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

    async def small(self, part: ByteRange) -> bytes | None:
        """The part, when it is small."""

    async def send(self, request: web.Request, response: web.StreamResponse, part: ByteRange) -> None:
        """Write the part. Raises when it breaks off."""


async def send(
    request: web.Request, body: Body, *, content_type: str, cache_control: str, etag: str | None = None
) -> web.StreamResponse:
    """Answer a GET with the object, or the part of it that is asked for; `etag` is quoted."""
    headers = {"Content-Type": content_type, "Cache-Control": cache_control, "Accept-Ranges": "bytes"}
    return await _send_part(request, headers, body, etag)


@contextmanager
def opened(file: LocalFile) -> Iterator[FileBody]:
    """A file to be sent. Raises NotFound when it has gone meanwhile."""
    with _open(file) as stream:
        yield FileBody(stream, file.size)


class SizeOnly:
    """The body of an answer to HEAD."""

    def __init__(self, size: int) -> None:
        self.size = size

    async def small(self, _part: ByteRange) -> bytes | None:
        """There is nothing to send."""
        return None

    async def send(self, _request: web.Request, _response: web.StreamResponse, _part: ByteRange) -> None:
        """There is nothing to send."""


def _open(delivery: LocalFile) -> BinaryIO:
    try:
        return Path(delivery.path).open("rb")
    except FileNotFoundError:
        raise NotFound("there is no such object in this cache") from None
    except OSError as error:
        raise StoreError(f"{delivery.path} cannot be read: {error.strerror}") from error


class FileBody:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.size = size

    async def small(self, part: ByteRange) -> bytes | None:
        """The part, when it is small."""
        if part.length > _SMALL:
            return None
        return await asyncio.to_thread(self._read, part)

    def _read(self, part: ByteRange) -> bytes:
        self._file.seek(part.start)
        data = self._file.read(part.length)
        if len(data) != part.length:
            raise StoreError(f"{self._file.name} has become shorter")
        return data

    async def send(self, request: web.Request, response: web.StreamResponse, part: ByteRange) -> None:
        """Let the kernel copy it, unless it has to be encrypted."""
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client has gone")
        if transport.get_extra_info("sslcontext") is not None:
            # The event loop's own way, 16 KiB a time, loses count of what waits, and fails when the client goes.
            for start in range(part.start, part.end, _TOGETHER):
                piece = ByteRange(start, min(start + _TOGETHER, part.end))
                await response.write(await asyncio.to_thread(self._read, piece))
            return
        sent = await asyncio.get_running_loop().sendfile(transport, self._file, part.start, part.length)
        if sent != part.length:
            raise StoreError(f"{self._file.name} has become shorter")


class ChunksBody:
    """What comes bit by bit: `read` gives the chunks of a part."""

    def __init__(self, size: int, read: Callable[[ByteRange], AsyncIterator[bytes]]) -> None:
        self.size = size
        self._read = read

    async def small(self, part: ByteRange) -> bytes | None:
        """The part, when it is small; what breaks off can then still be told."""
        if part.length > _SMALL:
            return None
        return b"".join([chunk async for chunk in self._read(part)])

    async def send(self, _request: web.Request, response: web.StreamResponse, part: ByteRange) -> None:
        """Pass it on as it comes."""
        async for chunk in self._read(part):
            await response.write(chunk)


async def _send_part(request: web.Request, headers: dict[str, str], body: Body, etag: str | None) -> web.StreamResponse:
    if etag:
        headers["ETag"] = etag
        if ranges.matches(request.headers.get("If-None-Match"), etag):
            return web.Response(status=304, headers=headers)
    part = None
    if ranges.range_holds(request.headers.get("If-Range"), etag):
        part = ranges.requested(request.headers.get("Range"), body.size)
    if part is not None:
        headers["Content-Range"] = f"bytes {part.start}-{part.end - 1}/{body.size}"
    return await _send_bytes(request, 200 if part is None else 206, headers, body, part or ByteRange(0, body.size))


async def _send_bytes(
    request: web.Request, status: int, headers: dict[str, str], body: Body, part: ByteRange
) -> web.StreamResponse:
    if request.method == "HEAD":
        return web.Response(status=status, headers={**headers, "Content-Length": str(part.length)})
    data = None if request.get(FRUGAL) and part.length > _VERY_SMALL else await body.small(part)
    if data is not None:
        return web.Response(status=status, headers=headers, body=data)
    response = web.StreamResponse(status=status, headers=headers)
    response.content_length = part.length
    request[BEGUN] = True
    await response.prepare(request)
    await body.send(request, response, part)
    await response.write_eof()
    return response
