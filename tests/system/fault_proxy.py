"""A proxy in front of a server of HTTP that fails as it is told.

It runs in a thread of its own, so that tests with and without an event loop can use it, and passes on what it gets as
it is, the Host header too: signed requests stay valid. Each planned fault takes the next request that it is meant for.
"""

from __future__ import annotations

import asyncio
import io
import threading
import time
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

import aiohttp
from aiohttp import web
from yarl import URL

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType
    from typing import Self

T = TypeVar("T")

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"

_OF_ONE_CONNECTION = {"connection", "keep-alive", "transfer-encoding"}


@dataclass(frozen=True)
class Answer:
    """An answer of the proxy's own; the request is not passed on."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


REFUSALS = {
    "expired": (
        Answer(400, b"<Error><Code>ExpiredToken</Code><Message>The token has expired.</Message></Error>"),
        "the credentials have expired: renew them",
    ),
    "clock": (
        Answer(
            403,
            b"<Error><Code>RequestTimeTooSkewed</Code></Error>",
            {"Date": formatdate(time.time() - 7200, usegmt=True)},
        ),
        "the clock of this machine is wrong by 7",
    ),
    "region": (
        Answer(301, b"<Error><Code>PermanentRedirect</Code></Error>", {"x-amz-bucket-region": "eu-west-3"}),
        'the bucket is in another region: set the region "eu-west-3"',
    ),
    "denied": (
        Answer(403, b"<Error><Code>AccessDenied</Code></Error>"),
        "access denied: the credentials need s3:",
    ),
}
"""What AWS says that the gateway of the tests does not, or not so; and what is to be told of it."""


@dataclass(frozen=True)
class Drop:
    """The connection ends without an answer, and the request is not passed on."""


@dataclass(frozen=True)
class LoseAnswer:
    """The request takes effect, and the connection ends without an answer."""


@dataclass(frozen=True)
class Hang:
    """No answer, ever."""


@dataclass(frozen=True)
class Delay:
    """The answer comes after so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Hold:
    """The request is passed on when this is set."""

    until: threading.Event


@dataclass(frozen=True)
class Truncate:
    """The answer ends after so many bytes of its body; with `half`, the proxy goes on listening."""

    after: int
    half: bool = False


@dataclass(frozen=True)
class Stall:
    """After so many bytes of its body, no more of the answer comes."""

    after: int


@dataclass(frozen=True)
class Alter:
    """The byte at this position of the body is another one."""

    at: int


@dataclass(frozen=True)
class CutRequest:
    """Only so many bytes of the body are passed on, then the connection to the server ends."""

    after: int


@dataclass(frozen=True)
class AlterRequest:
    """The byte at this position of the body of the request is another one."""

    at: int


Fault = Answer | Drop | LoseAnswer | Hang | Delay | Hold | Truncate | Stall | Alter | AlterRequest | CutRequest


@dataclass(frozen=True)
class Seen:
    """A request that came in."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]


@dataclass
class _Planned:
    fault: Fault
    meant: Callable[[Seen], bool]
    times: int


class FaultProxy:
    """In front of the server at `upstream`, a URL without a path. A context manager."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy")
        self._planned: list[_Planned] = []
        self._port = 0
        self._over = asyncio.Event()
        self._transports: WeakSet[asyncio.Transport] = WeakSet()
        self._site: web.TCPSite | None = None
        self.seen: list[Seen] = []
        self.bears = 0
        """So many requests at once; others are answered with 503. 0: any number."""
        self.crowds: list[int] = []
        """How many there were when each came."""
        self._under_way = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def plan(self, fault: Fault, *, method: str = "", query: str = "", path: str = "", times: int = 1) -> None:
        """Let the next `times` requests with this method, this parameter and this text in their path fail so."""

        self._planned.append(_Planned(fault, lambda seen: _is_meant(seen, method, query, path), times))

    def calm(self) -> None:
        """Forget what is planned and what was seen, and be up."""
        self._planned.clear()
        self.seen.clear()
        self.up()

    @property
    def waiting(self) -> int:
        """How many planned faults have found no request yet."""
        return sum(planned.times for planned in self._planned)

    def count(self, method: str = "", *, query: str = "", path: str = "") -> int:
        """How many such requests came in, as `plan` names them."""
        return sum(_is_meant(seen, method, query, path) for seen in self.seen)

    def down(self) -> None:
        """Refuse connections, and end those that are open."""
        self._wait(self._close())

    def up(self) -> None:
        """Listen again, where it was."""
        self._wait(self._listen())

    def __enter__(self) -> Self:
        self._thread.start()
        self._wait(self._open())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._wait(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _open(self) -> None:
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            connector=aiohttp.TCPConnector(limit=0),
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )
        await self._listen()

    async def _listen(self) -> None:
        if self._site is None:
            self._over.clear()
            self._runner = web.ServerRunner(web.Server(self._handle, auto_decompress=False), shutdown_timeout=0)
            await self._runner.setup()
            self._site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
            await self._site.start()
            self._port = self._runner.addresses[0][1]

    async def _end(self) -> None:
        await self._close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()
        # Connections close in the next rounds of the loop.
        await asyncio.sleep(0.05)

    async def _close(self) -> None:
        if self._site is not None:
            self._site = None
            self._over.set()
            await self._runner.cleanup()
            # What a client does not read is not waited for.
            for transport in self._transports:
                transport.abort()
            await asyncio.sleep(0)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._under_way += 1
        self.crowds.append(self._under_way)
        try:
            if 0 < self.bears < self._under_way:
                async for _ in request.content.iter_chunked(2**18):
                    pass
                return web.Response(status=503, text="too many requests")
            return await self._handle_one(request)
        finally:
            self._under_way -= 1

    async def _handle_one(self, request: web.BaseRequest) -> web.StreamResponse:
        url = URL(request.raw_path, encoded=True)
        seen = Seen(request.method, url.path, dict(url.query), dict(request.headers))
        self.seen.append(seen)
        if request.transport is not None:
            self._transports.add(request.transport)
        fault = self._take(seen)
        body = bytearray()
        async for chunk in request.content.iter_chunked(2**18):
            body += chunk
        match fault:
            case Answer(status, own, headers):
                return web.Response(status=status, body=own, headers=headers)
            case Drop():
                return hang_up(request)
            case Hang():
                await self._over.wait()
                return hang_up(request)
            case CutRequest(after):
                await self._cut(request, url, body[:after])
                return hang_up(request)
            case Delay(seconds):
                await asyncio.sleep(seconds)
            case Hold(until):
                await asyncio.to_thread(until.wait)
            case AlterRequest(at):
                body[at] ^= 1
        return await self._pass_on(request, url, body, fault)

    def _take(self, seen: Seen) -> Fault | None:
        for planned in self._planned:
            if planned.times and planned.meant(seen):
                planned.times -= 1
                return planned.fault
        return None

    async def _pass_on(
        self, request: web.BaseRequest, url: URL, body: bytearray, fault: Fault | None
    ) -> web.StreamResponse:
        target = URL(f"{self._upstream}{url.raw_path_qs}", encoded=True)
        async with self._session.request(
            request.method, target, headers=passed_on(request.headers), data=io.BytesIO(body), allow_redirects=False
        ) as answer:
            content = bytearray(await answer.read())
        if isinstance(fault, LoseAnswer):
            return hang_up(request)
        if isinstance(fault, Alter):
            content[fault.at] ^= 1
        response = web.StreamResponse(status=answer.status, headers=passed_on(answer.headers))
        if request.method != "HEAD":
            response.content_length = len(content)
        await response.prepare(request)
        if isinstance(fault, Truncate | Stall):
            await response.write(bytes(content[: fault.after]))
            return await self._break_off(request, fault)
        if request.method != "HEAD":
            await response.write(bytes(content))
        await response.write_eof()
        return response

    async def _break_off(self, request: web.BaseRequest, fault: Truncate | Stall) -> web.StreamResponse:
        if isinstance(fault, Truncate) and fault.half:
            assert request.transport is not None
            request.transport.write_eof()
        if isinstance(fault, Stall) or fault.half:
            await self._over.wait()
        return hang_up(request)

    async def _cut(self, request: web.BaseRequest, url: URL, start: bytearray) -> None:
        upstream = URL(self._upstream)
        reader, writer = await asyncio.open_connection(upstream.host, upstream.port)
        lines = [f"{request.method} {url.raw_path_qs} HTTP/1.1", *(f"{k}: {v}" for k, v in request.headers.items())]
        try:
            writer.write("".join(f"{line}\r\n" for line in [*lines, ""]).encode() + start)
            await writer.drain()
            writer.write_eof()
            await reader.read()
        finally:
            writer.transport.abort()


def _is_meant(seen: Seen, method: str, query: str, path: str) -> bool:
    return method in {"", seen.method} and (not query or query in seen.query) and path in seen.path


def passed_on(headers: Any) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers.items() if name.lower() not in _OF_ONE_CONNECTION]


def hang_up(request: web.BaseRequest) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.close()
    raise ConnectionResetError("a planned fault")
