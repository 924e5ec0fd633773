"""Other caches over HTTP: which failures pass, and which ones will not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from cachesrv.errors import PeerError, PeerUnavailable
from cachesrv.services.http_reader import HttpReader
from tests.certificate import contexts
from tests.waiting import PLENTY

if TYPE_CHECKING:
    from pathlib import Path


async def _answer(_request: web.Request) -> web.Response:
    return web.Response(body=b"text")


async def test_a_certificate_that_does_not_hold_may_hold_another_time(tmp_path: Path) -> None:
    ours, trusting = contexts(tmp_path)
    app = web.Application()
    app.router.add_get("/{name}", _answer)
    server = TestServer(app, scheme="https", host="localhost")
    await server.start_server(ssl=ours)
    try:
        async with aiohttp.ClientSession() as session:
            reader = HttpReader(session, str(server.make_url("/")), timeout=PLENTY)
            with pytest.raises(PeerUnavailable, match="certificate"):
                await reader.get("a", 10)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusting)) as session:
            assert await HttpReader(session, str(server.make_url("/")), timeout=PLENTY).get("a", 10) == b"text"
    finally:
        await server.close()


async def test_an_address_that_is_none_will_not_be_one_later() -> None:
    async with aiohttp.ClientSession() as session:
        reader = HttpReader(session, "http://127.0.0.1:1", timeout=PLENTY)
        for name in ("file:///etc/passwd", "http://[", "http://:x/a"):
            with pytest.raises(PeerError, match="its address cannot be used") as failure:
                await reader.get(name, 10)
            assert not isinstance(failure.value, PeerUnavailable), name
