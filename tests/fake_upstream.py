"""Somebody else's cache over HTTP, in this process, that fails as it is told."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from cachesrv.nix import narinfo
from cachesrv.nix.signing import SecretKey
from tests.waiting import PLENTY, let_pass

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from tests.samples import Sample

Fault = Callable[[web.Request], Awaitable[web.StreamResponse]]

KEY = SecretKey.generate("upstream-1")


class FakeUpstream:
    """An asynchronous context manager. `objects` by name; a request for a name is answered by the next one of its
    `faults`, while there are any, and is counted in `requests` by method and name.
    """

    def __init__(self, *, ranges: bool = True) -> None:
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, Iterator[Fault]] = {}
        self.requests: Counter[tuple[str, str]] = Counter()
        self.asked_from: list[int] = []
        self._ranges = ranges
        app = web.Application()
        app.router.add_route("*", "/{name:.*}", self._answer)
        self._server = TestServer(app)

    async def __aenter__(self) -> Self:
        await self._server.start_server()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.close()

    @property
    def url(self) -> str:
        return str(self._server.make_url("/")).rstrip("/")

    def add(self, sample: Sample, *, key: SecretKey | None = KEY, **changes: Any) -> narinfo.NarInfo:
        """A path with its NAR, signed; with some fields of its narinfo changed after that. What it says."""
        signatures = (key.sign(sample.info.fingerprint),) if key else ()
        info = replace(sample.info, **{"signatures": signatures, **changes})
        self.objects[f"{sample.path.hash_part}.narinfo"] = narinfo.render(info)
        self.objects[f"nar/{sample.nar_name}"] = sample.file
        return info

    def fail(self, name: str, *faults: Fault) -> None:
        """Answer the next requests for `name` so."""
        self.faults[name] = iter(faults)

    def asked(self, name: str, method: str = "GET") -> int:
        return self.requests[method, name]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        self.requests[request.method, name] += 1
        if fault := next(self.faults.get(name, iter(())), None):
            return await fault(request)
        if name not in self.objects:
            return web.Response(status=404)
        return await self._send(request, self.objects[name])

    async def _send(self, request: web.Request, data: bytes) -> web.StreamResponse:
        start = request.http_range.start or 0
        self.asked_from.append(start)
        if not start or not self._ranges:
            return web.Response(body=data)
        if start >= len(data):
            return web.Response(status=416)
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        return web.Response(status=206, body=data[start:], headers=headers)


def status(number: int, **headers: str) -> Fault:
    """An answer without content; dashes of header names are written as underscores."""

    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=number, headers={name.replace("_", "-"): text for name, text in headers.items()})

    return answer


def sent(data: bytes, **headers: str) -> Fault:
    """Something else, in full."""

    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=data, headers={name.replace("_", "-"): text for name, text in headers.items()})

    return answer


def cut(data: bytes, after: int) -> Fault:
    """The connection breaks after so many bytes."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = len(data)
        await response.prepare(request)
        await response.write(data[:after])
        assert request.transport
        request.transport.close()
        return response

    return answer


def unsized(data: bytes) -> Fault:
    """Nobody says how long it is."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        if request.method == "GET":
            await response.write(data)
            await response.write_eof()
        return response

    return answer


def trickling(data: bytes, pause: float) -> Fault:
    """A byte at a time."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = len(data)
        await response.prepare(request)
        for number in range(len(data)):
            await response.write(data[number : number + 1])
            await asyncio.sleep(pause)
        return response

    return answer


def waiting(gate: asyncio.Event, then: Fault) -> Fault:
    """Nothing, until the gate opens."""

    async def answer(request: web.Request) -> web.StreamResponse:
        await gate.wait()
        return await then(request)

    return answer


async def hang(_request: web.Request) -> web.StreamResponse:
    """Nothing, ever."""
    await asyncio.sleep(3600)
    raise AssertionError


async def silent(_request: web.Request) -> web.StreamResponse:
    """Nothing, until whoever waits for it has waited long enough, which is at once."""
    let_pass(PLENTY)
    await asyncio.sleep(10 * PLENTY)
    raise AssertionError


async def drop(request: web.Request) -> web.StreamResponse:
    """The connection closes without an answer."""
    assert request.transport
    request.transport.abort()
    return web.Response()
