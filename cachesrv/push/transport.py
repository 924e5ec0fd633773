"""When requests go to a server, how many at once, and how large they are."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NoReturn

import zstandard

from cachesrv.errors import CachesrvError, TooLarge
from cachesrv.push.body_limit import BodyLimit, BodyTooLarge, LengthWanted
from cachesrv.push.events import Noted
from cachesrv.push.requests import Requests
from cachesrv.push.retry import Away, Broken, Unreachable
from cachesrv.push.traffic import Traffic

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping

    from cachesrv.push.address import Address
    from cachesrv.push.connection import Body, Chunk, Timeouts
    from cachesrv.push.events import Emit
    from cachesrv.push.token import TokenSource

    Exchange = Callable[[str, str, AsyncIterable[Chunk], Mapping[str, str]], Awaitable[bytes]]
    """What is answered to a request: method, URL, body, headers."""

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
        self._requests = Requests(address, tokens, connections=connections + 1, timeouts=timeouts)
        self._emit = emit
        self._traffic = Traffic(connections, patience=patience)

    async def close(self) -> None:
        """End all connections."""
        await self._requests.close()

    @asynccontextmanager
    async def streaming(self) -> AsyncIterator[Exchange]:
        """For a request whose body is still being made: what sends it."""
        await self._be_sure()
        async with self._traffic.request(streams=True):
            yield self._stream

    async def send(self, method: str, url: str, body: Body, size: int, headers: Mapping[str, str]) -> bytes:
        """What is answered to a body of which all `size` bytes are here."""
        await self._be_sure()
        headers = {**headers, "Content-Length": str(size)}
        async with self._body(size), self._traffic.request():
            return await self._requests.send(method, url, body, headers)

    async def ask(self, method: str, url: str, body: bytes) -> bytes:
        """What is answered to JSON, or to nothing."""
        await self._be_sure()
        return await self._ask(method, url, body)

    async def _be_sure(self) -> None:
        """Raise Unreachable when the server is away for those as well who ask for little. That comes before what is
        tried again: so a request at which the server ends counts as a try each time, and an outage of any length once.
        """
        if not self._requests.in_doubt:
            return
        try:
            await self._ask("GET", self._address.api(), b"")
        except (Away, Broken, Unreachable) as error:
            raise Unreachable(str(error), error.retry_after) from error
        except CachesrvError:
            pass  # an answer as well: what it means is found out by who asked for more
        self._requests.in_doubt = False

    async def _ask(self, method: str, url: str, body: bytes) -> bytes:
        headers = {"Accept": "application/json"}
        if body:
            headers["Content-Type"] = "application/json"
        if len(body) >= _COMPRESS_FROM:
            headers["Content-Encoding"] = "zstd"
            body = zstandard.ZstdCompressor().compress(body)
        async with self._body(len(body)), self._traffic.request():
            return await self._requests.ask(method, url, body, headers)

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
            answered = await self._requests.send_once(method, url, counted, headers)
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
