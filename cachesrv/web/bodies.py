"""Request bodies on their way in: with an end, at a pace, decoded."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11, web

from cachesrv.errors import BadInput, TooLarge
from cachesrv.nix.compression import content_coding, decompress
from cachesrv.web.errors import BodyTooSlow, UnknownCoding

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_PACE_BYTES = 16 * 1024
"""A body has to bring so many bytes (or its end) in each stall time-out: slower clients hold what others need."""


async def chunks(request: web.Request, stall_timeout: float) -> AsyncIterator[bytes]:
    """The body as it comes. Raises BodyTooSlow, and BadInput when it breaks off."""
    if _is_waited_for(request) and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    loop = asyncio.get_running_loop()
    deadline, received = loop.time() + stall_timeout, 0
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                chunk = await request.content.readany()
        except TimeoutError:
            raise BodyTooSlow(f"less than {_PACE_BYTES} bytes of the body came in {stall_timeout:g} seconds") from None
        except (ConnectionError, web.RequestPayloadError) as error:
            raise BadInput("the body broke off") from error
        if not chunk:
            return
        yield chunk
        received += len(chunk)
        if received >= _PACE_BYTES:
            deadline, received = loop.time() + stall_timeout, 0


def _is_waited_for(request: web.Request) -> bool:
    """Whether the client sends the body when it is asked to. Source: RFC 9110, 10.1.1."""
    return request.version >= HttpVersion11 and request.headers.get("Expect", "").lower() == "100-continue"


def coding(request: web.Request) -> str:
    """How the body is compressed: a name of `cachesrv.nix.compression`. Raises UnknownCoding."""
    name = request.headers.get("Content-Encoding", "identity")
    try:
        return content_coding(name)
    except BadInput as error:
        raise UnknownCoding(f"Content-Encoding {name[:50]!r} cannot be decoded here") from error


def decoded_size(request: web.Request, limit: int) -> int:
    """How many bytes a body may come to, `limit` where that is not said. Raises UnknownCoding."""
    size = request.content_length
    return size if size is not None and coding(request) == "none" else limit


async def whole(request: web.Request, limit: int, stall_timeout: float) -> bytes:
    """A small body, decoded; at most `limit` bytes before and after. Raises TooLarge."""
    compression = coding(request)
    if request.content_length is not None and request.content_length > limit:
        raise TooLarge(f"a body of {request.content_length} bytes, at most {limit} are taken here")
    received = bytearray()
    async for chunk in chunks(request, stall_timeout):
        received += chunk
        if len(received) > limit:
            raise TooLarge(f"a body of more than {limit} bytes, which is what is taken here at most")
    if compression == "none":
        return bytes(received)
    return await asyncio.to_thread(decompress, compression, bytes(received), limit)


async def decoded(request: web.Request, encoded_limit: int, stall_timeout: float) -> AsyncIterator[bytes]:
    """A body of any size, decoded; one that needs decoding may have `encoded_limit` bytes, before and after."""
    if coding(request) == "none":
        async for chunk in chunks(request, stall_timeout):
            yield chunk
    else:
        yield await whole(request, encoded_limit, stall_timeout)
