"""Sending on connections that have been used before: the other side may have closed one while nothing was on it, which
shows only when it is used again. That says nothing about the server, or what it bears.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import aiohttp

from cachesrv.push.session import open_session

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import SimpleNamespace

Result = TypeVar("Result")


@dataclass(slots=True)
class Sending:
    """A request on its way, the `trace_request_ctx` of the library. `may_be_late`: its connection was used before, and
    no answer has begun.
    """

    may_be_late: bool = False


class Connections:
    """To one host, at most so many at once, kept for the next requests. Raises ConfigError as `open_session` does."""

    def __init__(self, url: str, most: int) -> None:
        self._url = url
        self._most = most
        self._kept = open_session(url, most, trace=_watching())
        self._new: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """End all of them."""
        await self._kept.close()
        if self._new is not None:
            await self._new.close()

    async def send_once(self, send: Callable[[aiohttp.ClientSession, Sending], Awaitable[Result]]) -> Result:
        """What `send` returns, whose body cannot be sent again."""
        return await send(self._kept, Sending())

    async def send(self, send: Callable[[aiohttp.ClientSession, Sending], Awaitable[Result]]) -> Result:
        """What `send` returns; called again, on a new connection, if that came too late to one used before."""
        sending = Sending()
        try:
            return await send(self._kept, sending)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, aiohttp.ClientConnectionResetError):
            if not sending.may_be_late:
                raise
        if self._new is None:
            self._new = open_session(self._url, self._most, keep=False)
        return await send(self._new, Sending())


def _watching() -> aiohttp.TraceConfig:
    async def reused(_session: aiohttp.ClientSession, context: SimpleNamespace, _: object) -> None:
        context.trace_request_ctx.may_be_late = True

    async def not_late(_session: aiohttp.ClientSession, context: SimpleNamespace, _: object) -> None:
        context.trace_request_ctx.may_be_late = False

    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(reused)
    trace.on_connection_create_end.append(not_late)
    trace.on_request_end.append(not_late)
    return trace
