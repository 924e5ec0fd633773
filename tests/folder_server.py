"""A folder over HTTP, with the faults that servers and networks have, in a thread of its own."""

from __future__ import annotations

import asyncio
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass
class FolderServer:
    """Serves `folder`, and notes what it was asked for. Faults are set between requests."""

    folder: Path
    url: str = ""
    ranges: bool = True
    token: str | None = None
    """Asked of everybody, as a Bearer token."""
    breaks_after: int | None = None
    """Bytes of a NAR after which the connection ends, every time."""
    failures: int = 0
    """So many requests are answered with 503 first."""
    redirects_nars_to: str | None = None
    encodings: dict[str, str] = field(default_factory=dict)
    """Content-Encoding by name of the object."""
    asked: list[str] = field(default_factory=list)
    """`GET <name>`, with ` <Range>` where one was asked for."""
    tokens: list[str | None] = field(default_factory=list)
    """The Authorization of each request."""
    nar_bytes: int = 0
    """Bytes of NARs that were sent."""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        wanted = request.headers.get("Range")
        self.asked.append(f"{request.method} {name}{f' {wanted}' if wanted else ''}")
        self.tokens.append(request.headers.get("Authorization"))
        if self.failures:
            self.failures -= 1
            return web.Response(status=503)
        if self.token is not None and self.tokens[-1] != f"Bearer {self.token}":
            return web.Response(status=401, text="who are you?\n")
        if self.redirects_nars_to and name.startswith("nar/"):
            raise web.HTTPFound(f"{self.redirects_nars_to}/{name}")
        data = _contents(self.folder / name)
        if data is None:
            return web.Response(status=404, text="no such path\n")
        return await self._send(request, name, data, wanted)

    async def _send(self, request: web.Request, name: str, data: bytes, wanted: str | None) -> web.StreamResponse:
        headers = {"Content-Encoding": self.encodings.get(name, "identity")}
        start, end, status = 0, len(data), 200
        if wanted and self.ranges:
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
            assert match
            start, end = int(match[1]), min(end, int(match[2] or end) + 1)
            if start >= len(data):
                return web.Response(status=416)
            headers["Content-Range"], status = f"bytes {start}-{end - 1}/{len(data)}", 206
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = end - start
        await response.prepare(request)
        is_nar = name.startswith("nar/")
        if is_nar and self.breaks_after is not None and end - start > self.breaks_after:
            self.nar_bytes += self.breaks_after
            await response.write(data[start : start + self.breaks_after])
            assert request.transport is not None
            request.transport.close()
            return response
        for position in range(start, end, 65536):
            # Before: who has got the last of it may look at once.
            self.nar_bytes += is_nar * (min(position + 65536, end) - position)
            await response.write(data[position : min(position + 65536, end)])
        await response.write_eof()
        return response


@contextmanager
def serving(server: FolderServer) -> Iterator[FolderServer]:
    """The server, which has its URL while it serves."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(_app(server), shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def _contents(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _app(server: FolderServer) -> web.Application:
    app = web.Application()
    app.router.add_get("/{name:.+}", server.answer)
    return app
