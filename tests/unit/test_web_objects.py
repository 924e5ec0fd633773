"""Bodies that come bit by bit, from memory and from files, in plain text and encrypted."""

from __future__ import annotations

import asyncio
import itertools
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp
import pytest
from aiohttp import web

from cachesrv.storage.base import ByteRange, FilePart, LocalFile
from cachesrv.web import objects
from tests.certificate import contexts

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

DATA = os.urandom(2_000_000)
BORDERS = (0, 100, 400_000, 1_500_000, len(DATA))
"""Where pieces end; every other one lies in a file."""


class Pieces:
    """What is sent; `cut` leaves out the end of the file."""

    def __init__(self, file: Path, *, cut: bool = False) -> None:
        file.write_bytes(DATA[: -1 if cut else None])
        self._file = file
        self.open_files = 0

    async def read(self, part: ByteRange) -> AsyncGenerator[bytes | FilePart, None]:
        self.open_files += 1
        try:
            with self._file.open("rb") as file:
                for number, (start, end) in enumerate(itertools.pairwise(BORDERS)):
                    piece = ByteRange(max(start, part.start), min(end, part.end))
                    if piece.start < piece.end:
                        yield FilePart(file, piece) if number % 2 else DATA[piece.start : piece.end]
        finally:
            self.open_files -= 1


@asynccontextmanager
async def asking(
    pieces: Pieces, tls: tuple[ssl.SSLContext, ssl.SSLContext] | None
) -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
    """A server of one object, and a client."""

    async def handle(request: web.Request) -> web.StreamResponse:
        async with objects.ChunksBody(len(DATA), pieces.read) as body:
            return await objects.send(request, body, content_type="x/y", cache_control="no-cache")

    app = web.Application()
    app.router.add_get("/", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
    await runner.setup()
    assert runner.server is not None
    server = await asyncio.get_running_loop().create_server(runner.server, "127.0.0.1", 0, ssl=tls[0] if tls else None)
    url = f"{'https' if tls else 'http'}://localhost:{server.sockets[0].getsockname()[1]}/"
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls[1] if tls else True)) as session:
            yield session, url
    finally:
        server.close()
        await runner.cleanup()


@pytest.fixture(params=["plain", "encrypted"])
def tls(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext] | None:
    return contexts(tmp_path) if request.param == "encrypted" else None


@pytest.mark.parametrize("part", [(0, len(DATA)), (0, 1000), (99, 101), (350_000, 450_000), (1_999_999, 2_000_000)])
async def test_it_arrives(
    tmp_path: Path, tls: tuple[ssl.SSLContext, ssl.SSLContext] | None, part: tuple[int, int]
) -> None:
    pieces = Pieces(tmp_path / "file")
    async with asking(pieces, tls) as (session, url):
        for _ in range(2):
            headers = {"Range": f"bytes={part[0]}-{part[1] - 1}"}
            async with session.get(url, headers=headers) as response:
                assert await response.read() == DATA[part[0] : part[1]]
    assert pieces.open_files == 0


async def test_a_file_that_has_become_shorter_is_no_whole_answer(
    tmp_path: Path, tls: tuple[ssl.SSLContext, ssl.SSLContext] | None
) -> None:
    pieces = Pieces(tmp_path / "file", cut=True)
    async with asking(pieces, tls) as (session, url):
        async with session.get(url) as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        assert pieces.open_files == 0


def test_a_file_that_was_replaced_has_the_size_that_it_has(tmp_path: Path) -> None:
    seen = LocalFile(str(tmp_path / "file"), 4)
    assert objects.opened(seen) is None
    (tmp_path / "file").write_bytes(b"replaced")
    file = objects.opened(seen)
    assert file
    with file:
        assert file.size == 8
