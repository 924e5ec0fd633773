"""Whatever way an answer takes, it counts as use; what is not there does not."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from tests.front_site import ABSENT, LARGE, MEDIUM, NARS, PRESENT, SMALL, front_server, open_site, plain_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from cachesrv.web.site import Site

    Serve = Callable[[Site], AbstractAsyncContextManager[int]]


@asynccontextmanager
async def by_reactor(site: Site) -> AsyncIterator[int]:
    async with front_server(site, by_reactor=True) as served:
        yield served.port


@asynccontextmanager
async def by_front(site: Site) -> AsyncIterator[int]:
    async with front_server(site) as served:
        yield served.port


@pytest.mark.parametrize("serve", [by_reactor, by_front, plain_server])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_every_way_counts(tmp_path: Path, serve: Serve, method: str) -> None:
    names = {size: name for name, size in NARS.items()}
    wanted = [f"nar/{names[size]}" for size in (SMALL, MEDIUM, LARGE)]
    wanted += [f"{part}.narinfo" for part in PRESENT[:2]]
    absent = [f"nar/{'1' * 52}.nar.zst", f"{ABSENT[0]}.narinfo", f"nar/{'2' * 52}.nar"]
    async with open_site(tmp_path) as site, serve(site) as port:
        for name in [*wanted, *absent, *wanted]:
            await ask(port, method, f"/open/{name}")
        usage = site.services.usage
        assert usage._gathered == {f"open/{part}".encode() for part in PRESENT[:2]}
        assert usage._nars == {f"open/nar/{names[size]}" for size in (SMALL, MEDIUM, LARGE)}


async def ask(port: int, method: str, path: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: cache\r\nConnection: close\r\n\r\n".encode())
    assert (await reader.readline()).startswith(b"HTTP/1.1 ")
    await reader.read()
    writer.close()
    await writer.wait_closed()
