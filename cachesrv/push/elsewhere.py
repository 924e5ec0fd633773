"""The storage of a server, which takes parts of NARs by URLs that the server has signed. It sees no token of ours."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from yarl import URL

from cachesrv.errors import BadInput, ServerError
from cachesrv.push.one_line import one_line
from cachesrv.push.refusal import TOO_MUCH, NotThere, seconds_until
from cachesrv.push.retry import Overloaded, TryAgain
from cachesrv.push.reuse import Connections, Sending
from cachesrv.push.session import error_body, for_nars, our_errors, watched
from cachesrv.push.traffic import Traffic

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    import aiohttp

    from cachesrv.push.connection import Body, Timeouts
    from cachesrv.turns import Turn

_SAID = re.compile(r"<(Code|Message)>([^<]*)</")
_PASSING = frozenset({"BadDigest", "ExpiredToken", "IncompleteBody"})
_MAYBE_EXPIRED = 403
"""What a URL gets that has expired. AWS says so in words, Ceph does not: it may be that. The next URL is a new one."""
_SLOWER = frozenset({"RequestTimeout", "ServiceUnavailable", "SlowDown"})


class Elsewhere:
    """Connections are made when they are first needed, at most `connections` at once; a storage that asks for more
    than `patience` seconds is not waited for.
    """

    def __init__(self, connections: int, timeouts: Timeouts, *, patience: float) -> None:
        self._most = connections
        self._timeouts = timeouts
        self._traffic = Traffic(connections, patience=patience)
        self._connections: Connections | None = None
        self.proven = False
        """Whether a part has arrived there."""

    async def close(self) -> None:
        """End all connections."""
        if self._connections is not None:
            await self._connections.close()

    def turn(self) -> AbstractAsyncContextManager[Turn]:
        """To be waited for before a URL is signed: it does not grow old waiting."""
        return self._traffic.turn()

    async def put(self, turn: Turn, url: str, headers: Mapping[str, str], body: Body) -> str:
        """Send a part, once; its ETag, without quotes. Raises TryAgain when that may pass, by another URL; NotThere
        when there is no such upload; ServerError when it is not taken; BadInput when that is no URL for it.
        """
        target = _target(url)
        if not all(map(str.isprintable, (*headers, *headers.values()))):
            raise BadInput("the server wants parts of NARs to be sent with headers that are none")
        with self._traffic.heard(turn), our_errors(target.host_port_subcomponent or ""):
            return await self._opened(target).send(self._put(target, headers, body))

    def _put(
        self, target: URL, headers: Mapping[str, str], body: Body
    ) -> Callable[[aiohttp.ClientSession, Sending], Awaitable[str]]:
        host = target.host_port_subcomponent or ""

        async def put(session: aiohttp.ClientSession, sending: Sending) -> str:
            async with (
                asyncio.timeout(None) as deadline,
                session.put(
                    target,
                    data=watched(body(), deadline, self._timeouts),
                    headers=headers,
                    allow_redirects=False,
                    timeout=for_nars(self._timeouts),
                    trace_request_ctx=sending,
                ) as response,
            ):
                if response.status == 200:
                    tag = response.headers.get("ETag", "").strip('"')
                    if not tag:
                        raise ServerError(f"{host} does not say what it calls a part (ETag)")
                    self.proven = True
                    return tag
                said = (await error_body(response)).decode(errors="replace")
                raise _refusal(response, dict(_SAID.findall(said)), host)

        return put

    def _opened(self, target: URL) -> Connections:
        if self._connections is None:
            self._connections = Connections(str(target), self._most)
        return self._connections


def _target(url: str) -> URL:
    try:
        target = URL(url, encoded=True)
        (target.raw_host or "").encode("idna")
        there = target.scheme in {"http", "https"} and target.host and target.port
    except ValueError:
        there = None
    if not there:
        raise BadInput("the server sends us with parts of NARs to what is no URL")
    return target


def _refusal(response: aiohttp.ClientResponse, said: Mapping[str, str], host: str) -> ServerError:
    code = said.get("Code", "")
    because = one_line(": ".join(filter(None, (code, said.get("Message", ""))))) or f"status {response.status}"
    if response.status == 404:
        return NotThere(f"{host} does not know the upload: {because}")
    if response.status in TOO_MUCH or code in _SLOWER:
        return Overloaded(f"{host} says {because}", seconds_until(response.headers))
    if response.status == _MAYBE_EXPIRED or response.status >= 500 or code in _PASSING:
        return TryAgain(f"{host} says {because}", seconds_until(response.headers))
    return ServerError(f"{host} does not take a part: {because}")
