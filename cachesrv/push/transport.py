"""Requests to one server and its answers, over HTTP: who asks, how many at once, how large they are.

Redirects are not followed: a body cannot be sent twice, and the token belongs to nobody else.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NoReturn

import zstandard

from cachesrv.api import MAX_REQUEST_SIZE
from cachesrv.errors import CachesrvError, NotAuthenticated, ServerError, TooLarge
from cachesrv.push.body_limit import BodyLimit, BodyTooLarge, LengthWanted
from cachesrv.push.connection import MAX_ERROR_SIZE, may_need_proxy
from cachesrv.push.events import Noted
from cachesrv.push.questions import Questions
from cachesrv.push.refusal import refusal, said_in, seconds_until
from cachesrv.push.retry import Away, Broken, TryAgain, Unreachable
from cachesrv.push.traffic import Traffic

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping

    import aiohttp

    from cachesrv.push.address import Address
    from cachesrv.push.connection import Chunk, Timeouts
    from cachesrv.push.events import Emit
    from cachesrv.push.reuse import Connections, Sending
    from cachesrv.push.token import TokenSource

    Exchange = Callable[[str, str, AsyncIterable[Chunk], Mapping[str, str]], Awaitable[bytes]]
    """What is answered to a request: method, URL, body, headers."""

    Body = Callable[[], AsyncIterable[Chunk]]
    """The bytes of one, each time from the start."""

    Send = Callable[[aiohttp.ClientSession, Sending], Awaitable[bytes]]

_COMPRESS_FROM = 1024


class Transport:
    """To the server at an address, with a token. A server that asks for more than `patience` seconds is not waited for.

    Raises ConfigError; all requests raise TryAgain, ServerError, and what `refusal` says, BodyTooLarge only where
    smaller bodies may be taken.
    """

    def __init__(
        self,
        address: Address,
        tokens: TokenSource,
        *,
        connections: int,
        patience: float,
        timeouts: Timeouts,
        emit: Emit,
    ) -> None:
        self.bodies = BodyLimit()
        self._address = address
        self._tokens = tokens
        self._token = tokens.read()
        self._most = connections + 1
        self._timeouts = timeouts
        self._emit = emit
        self._traffic = Traffic(connections, patience=patience)
        self._questions = Questions(address, timeouts, limit=MAX_REQUEST_SIZE)
        self._connections: Connections | None = None
        self._in_doubt = False
        """Whether the last that was heard is that the server may be away."""

    async def close(self) -> None:
        """End all connections."""
        if self._connections is not None:
            await self._connections.close()

    @asynccontextmanager
    async def streaming(self) -> AsyncIterator[Exchange]:
        """For a request whose body is still being made: what sends it."""
        await self._be_sure()
        async with self._traffic.request(streams=True):
            yield self._stream

    async def send(self, method: str, url: str, body: Body, size: int, headers: Mapping[str, str]) -> bytes:
        """What is answered to a body of which all `size` bytes are here."""
        from cachesrv.push.session import our_errors  # noqa: PLC0415  brings the library with it

        await self._be_sure()
        headers = {**headers, "Content-Length": str(size)}
        async with self._body(size), self._traffic.request():
            with our_errors(self._address):
                return await self._opened().send(self._exchange(method, url, body, headers))

    async def ask(self, method: str, url: str, body: bytes) -> bytes:
        """What is answered to JSON, or to nothing."""
        await self._be_sure()
        return await self._ask(method, url, body)

    async def _be_sure(self) -> None:
        """Raise Unreachable when the server is away for those as well who ask for little. That comes before what is
        tried again: so a request at which the server ends counts as a try each time, and an outage of any length once.
        """
        if not self._in_doubt:
            return
        try:
            await self._ask("GET", self._address.api(), b"")
        except (Away, Broken, Unreachable) as error:
            raise Unreachable(str(error), error.retry_after) from error
        except CachesrvError:
            pass  # an answer as well: what it means is found out by who asked for more
        self._in_doubt = False

    async def _ask(self, method: str, url: str, body: bytes) -> bytes:
        headers = {"Accept": "application/json"}
        if body:
            headers["Content-Type"] = "application/json"
        if len(body) >= _COMPRESS_FROM:
            headers["Content-Encoding"] = "zstd"
            body = zstandard.ZstdCompressor().compress(body)
        async with self._body(len(body)), self._traffic.request():
            if self._connections is None and not may_need_proxy(os.environ):
                token = self._token
                said = await self._questions.ask(method, url, {**_authorization(token), **headers}, body)
                self._check(said.status, said.headers, said.body, token)
                return said.body
            return await self._ask_in_session(method, url, headers, body)

    @asynccontextmanager
    async def _body(self, size: int) -> AsyncIterator[None]:
        """For sending a body of so many bytes. Raises BodyTooLarge when it is not taken and smaller ones may be; it is
        not sent when that is known.
        """
        if self.bodies.within(size) < size:
            raise BodyTooLarge(f"{size} bytes in one request are too many for {self._address} or a proxy before it")
        begun = self.bodies.begun()
        try:
            yield
        except BodyTooLarge as error:
            self._refused(size, error)
        except Broken as error:
            await self._broke(size, begun, error)
        self.bodies.taken(size)

    async def _stream(self, method: str, url: str, chunks: AsyncIterable[Chunk], headers: Mapping[str, str]) -> bytes:
        from cachesrv.push.session import our_errors  # noqa: PLC0415  brings the library with it

        size, failed, begun = 0, False, self.bodies.begun()

        async def counted() -> AsyncIterator[Chunk]:
            nonlocal size, failed
            try:
                async for chunk in chunks:
                    size += len(chunk)
                    yield chunk
            except Exception:
                failed = True
                raise

        try:
            with our_errors(self._address):
                answered = await self._opened().send_once(self._exchange(method, url, counted, headers))
        except BodyTooLarge as error:
            self._refused(size, error)
        except LengthWanted:
            self.bodies.lengths = True
            raise
        except Broken as error:
            if failed:
                raise
            await self._broke(size, begun, error)
        self.bodies.taken(size)
        return answered

    def _refused(self, size: int, error: BodyTooLarge) -> NoReturn:
        """A body of so many bytes, or more, was not taken: raise what that means."""
        before = self.bodies.within(size)
        if not self.bodies.refused(size):
            raise TooLarge(f"{error}, with its {size} bytes") from error
        if self.bodies.within(size) < before:
            self._emit(Noted(f"{error}: bodies of at most {self.bodies.within(size)} bytes are sent"))
        raise error

    async def _broke(self, size: int, begun: int, error: Broken) -> NoReturn:
        """The connection broke under a body of so many bytes: raise what that means."""
        too_many = self.bodies.broke(size, begun)
        if too_many and await self._answers():
            why = f"requests of {too_many} bytes to {self._address} break each time, as if a proxy before it took less"
            self._refused(too_many, BodyTooLarge(why))
        raise error

    async def _answers(self) -> bool:
        """Whether the server is there for those who ask for little."""
        try:
            await self._ask("GET", self._address.api(), b"")
        except CachesrvError:
            return False
        return True

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
        self._in_doubt |= isinstance(error, Away | Broken)
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
