"""A proxy in front of a cache that counts what an uploader sends, byte by byte, and breaks in after so many of them.

Bodies are passed on as they come, so that what is cut short is cut short for the server as well.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import web
from yarl import URL

from cachesrv import pack
from cachesrv.errors import BadInput
from tests.system.fault_proxy import FaultProxy, hang_up, passed_on
from tests.system.server import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

_CHUNK = 64 * 1024
_PACKS = "/nars"
_COMPLETES = re.compile(r".*/uploads/([^/]*)/complete")
_CARRIES_NARS = re.compile(r"PUT .*/(parts|nar)/[^/]*|POST .*/nars")


@dataclass
class Body:
    """What was sent with one request: `size` bytes of it so far. `acknowledged_at`: how many bodies had begun when the
    uploader was told that it is there, None if it was not.
    """

    path: str
    size: int = 0
    acknowledged_at: int | None = None
    data: bytearray = field(default_factory=bytearray, repr=False)

    @property
    def names(self) -> list[str]:
        """Of all that is there once it is acknowledged: a part, a NAR, or the NARs of a pack that is whole."""
        if not self.path.endswith(_PACKS):
            return [self.path]
        with suppress(BadInput):
            return [nar.nar_hash for nar in pack.decode(self.data, pack.LIMITS).head.nars]
        return []


@dataclass
class _Trouble:
    after: int
    act: Callable[[], None]


class CountingProxy(FaultProxy):
    """Faults cannot be planned for it, but troubles."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.bodies: list[Body] = []
        """All that carried NARs, in the order in which they began."""
        self.sent = 0
        """Bytes of them."""
        self.completed: set[str] = set()
        """The names of uploads that somebody has asked to complete."""
        self._troubles: list[_Trouble] = []
        self._under_way = 0

    def trouble(self, after: int, act: Callable[[], None]) -> None:
        """Do this, in a thread, when so many more bytes have been sent since the trouble before, or from now on; what
        carries the last of them waits.
        """
        before = self._troubles[-1].after if self._troubles else self.sent
        self._troubles.append(_Trouble(before + after, act))

    @property
    def pending(self) -> int:
        """Troubles that have not come yet."""
        return len(self._troubles)

    @property
    def unacknowledged(self) -> list[Body]:
        """What is on its way, or was lost there."""
        return [body for body in self.bodies if body.acknowledged_at is None]

    def cut(self) -> None:
        """End all connections; new ones are taken. Not to be called from the thread of the proxy."""
        self._wait(self._cut_all())

    def settle(self) -> None:
        """Wait until nothing is under way any more."""
        until(lambda: not self._under_way, "requests are under way though the uploader has ended")

    async def _cut_all(self) -> None:
        for transport in self._transports:
            transport.abort()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._under_way += 1
        if match := _COMPLETES.fullmatch(request.path):
            self.completed.add(match[1])
        if request.transport is not None:
            self._transports.add(request.transport)
        try:
            return await self._carry(request, Body(request.path))
        except (aiohttp.ClientError, ConnectionError):
            return hang_up(request)
        finally:
            self._under_way -= 1

    async def _carry(self, request: web.BaseRequest, body: Body) -> web.StreamResponse:
        chunks = self._counted(request, body) if _CARRIES_NARS.fullmatch(f"{request.method} {body.path}") else None
        async with self._session.request(
            request.method,
            URL(f"{self._upstream}{request.raw_path}", encoded=True),
            headers=[*passed_on(request.headers), ("Connection", "close")],
            data=chunks or (await request.read() or None),
            allow_redirects=False,
        ) as answer:
            content = await answer.read()
        response = web.StreamResponse(status=answer.status, headers=passed_on(answer.headers))
        response.content_length = len(content)
        await response.prepare(request)
        await response.write(content)
        await response.write_eof()
        if chunks is not None and answer.status < 300 and request.transport is not None:
            body.acknowledged_at = len(self.bodies)
        return response

    async def _counted(self, request: web.BaseRequest, body: Body) -> AsyncIterator[bytes]:
        self.bodies.append(body)
        async for chunk in request.content.iter_chunked(_CHUNK):
            body.size += len(chunk)
            self.sent += len(chunk)
            if body.path.endswith(_PACKS):
                body.data += chunk
            if self._troubles and self.sent >= self._troubles[0].after:
                await asyncio.to_thread(self._troubles.pop(0).act)
            yield chunk
