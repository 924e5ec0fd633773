"""Single requests to one server, and what their answers mean: by whom they are sent, and with which token.

Redirects are not followed: a body cannot be sent twice, and the token belongs to nobody else. Small questions go
without the library as long as nothing has needed it: it takes longer to load than they do.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from cachesrv.api import MAX_REQUEST_SIZE
from cachesrv.errors import NotAuthenticated, ServerError
from cachesrv.push.connection import MAX_ERROR_SIZE, may_need_proxy
from cachesrv.push.questions import Questions
from cachesrv.push.refusal import refusal, said_in, seconds_until
from cachesrv.push.retry import Away, Broken, TryAgain

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    import aiohttp

    from cachesrv.push.address import Address
    from cachesrv.push.connection import Body, Timeouts
    from cachesrv.push.reuse import Connections, Sending
    from cachesrv.push.token import TokenSource

    Send = Callable[[aiohttp.ClientSession, Sending], Awaitable[bytes]]


class Requests:
    """To the server at an address, over at most so many `connections`. Raises ConfigError; all requests raise TryAgain,
    ServerError, and what `refusal` says.
    """

    def __init__(self, address: Address, tokens: TokenSource, *, connections: int, timeouts: Timeouts) -> None:
        self._address = address
        self._tokens = tokens
        self._token = tokens.read()
        self._most = connections
        self._timeouts = timeouts
        self._questions = Questions(address, timeouts, limit=MAX_REQUEST_SIZE)
        self._connections: Connections | None = None
        self.in_doubt = False
        """Whether the last that was heard is that the server may be away."""

    async def close(self) -> None:
        """End all connections."""
        if self._connections is not None:
            await self._connections.close()

    async def ask(self, method: str, url: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        """What is answered to little that is answered soon."""
        if self._connections is not None or may_need_proxy(os.environ):
            return await self._ask_in_session(method, url, headers, body)
        token = self._token
        said = await self._questions.ask(method, url, {**_authorization(token), **headers}, body)
        self._check(said.status, said.headers, said.body, token)
        return said.body

    async def send(self, method: str, url: str, body: Body, headers: Mapping[str, str]) -> bytes:
        """What is answered to a body that may take its time."""
        from cachesrv.push.session import our_errors  # noqa: PLC0415  brings the library with it

        with our_errors(self._address):
            return await self._opened().send(self._exchange(method, url, body, headers))

    async def send_once(self, method: str, url: str, body: Body, headers: Mapping[str, str]) -> bytes:
        """The same for a body that is gone once it was sent."""
        from cachesrv.push.session import our_errors  # noqa: PLC0415  brings the library with it

        with our_errors(self._address):
            return await self._opened().send_once(self._exchange(method, url, body, headers))

    def _exchange(self, method: str, url: str, body: Body, headers: Mapping[str, str]) -> Send:
        """Sends a body that may take its time; what is answered."""
        from cachesrv.push.session import for_nars, watched  # noqa: PLC0415  brings the library with it

        token = self._token

        async def exchange(session: aiohttp.ClientSession, sending: Sending) -> bytes:
            async with (
                asyncio.timeout(None) as deadline,
                session.request(
                    method,
                    url,
                    data=watched(body(), deadline, self._timeouts),
                    headers={**_authorization(token), **headers},
                    allow_redirects=False,
                    timeout=for_nars(self._timeouts),
                    trace_request_ctx=sending,
                ) as response,
            ):
                deadline.reschedule(asyncio.get_running_loop().time() + self._timeouts.answer)
                return await self._answered(response, token)

        return exchange

    async def _ask_in_session(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> bytes:
        from cachesrv.push.session import for_answers, our_errors  # noqa: PLC0415  brings the library with it

        token = self._token

        async def ask(session: aiohttp.ClientSession, sending: Sending) -> bytes:
            async with session.request(
                method,
                url,
                data=body or None,
                headers={**_authorization(token), **headers},
                allow_redirects=False,
                timeout=for_answers(self._timeouts),
                trace_request_ctx=sending,
            ) as response:
                return await self._answered(response, token)

        with our_errors(self._address):
            return await self._opened().send(ask)

    def _opened(self) -> Connections:
        """From the first time on that something is sent."""
        from cachesrv.push.reuse import Connections  # noqa: PLC0415  brings the library with it

        if self._connections is None:
            self._connections = Connections(self._address.base, self._most)
        return self._connections

    async def _answered(self, response: aiohttp.ClientResponse, token: str | None) -> bytes:
        from cachesrv.push.session import error_body  # noqa: PLC0415  brings the library with it

        if 200 <= response.status < 300:
            return await _read(response, MAX_REQUEST_SIZE)
        headers = {name.lower(): value for name, value in response.headers.items()}
        self._check(response.status, headers, await error_body(response), token)
        raise ServerError(f"{self._address} answers with status {response.status}")

    def _check(self, status: int, headers: Mapping[str, str], body: bytes, token: str | None) -> None:
        """Raise what an answer without success means to a request with this token. One that was renewed meanwhile is
        worth another try.
        """
        if 200 <= status < 300:
            return
        error = refusal(
            status,
            said_in(body[:MAX_ERROR_SIZE], headers.get("content-type", "").partition(";")[0].strip().lower()),
            self._address,
            self._tokens,
            location=headers.get("location", ""),
            retry_after=seconds_until(headers),
        )
        if isinstance(error, NotAuthenticated):
            self._token = self._tokens.read()
            if token != self._token:
                raise TryAgain(f"the token from {self._tokens} has been renewed")
        self.in_doubt |= isinstance(error, Away | Broken)
        raise error


def _authorization(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > limit:
            raise ServerError(f"an answer of more than {limit} bytes")
    return bytes(body)
