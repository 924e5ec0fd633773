"""A site with real stores below a folder, and servers for it in this process: with the front, and aiohttp's alone."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from random import Random
from typing import TYPE_CHECKING, Any

from aiohttp import web

from cachesrv import config, wiring
from cachesrv.catalog.base import TokenRecord
from cachesrv.index.base import IndexEntry
from cachesrv.nix import base32
from cachesrv.services.access import token_hash
from cachesrv.services.answer import present
from cachesrv.telemetry import Metrics
from cachesrv.web import server
from cachesrv.web.app import create_app
from cachesrv.web.front import IDLE_SECONDS
from cachesrv.web.site import Site

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from cachesrv.web.front import Fronts
    from cachesrv.web.reactor import Reactor
    from cachesrv.web.site import Services

READER = "csrv_reads-the-team-cache"
STRANGER = "csrv_reads-another-cache"
IN_CATALOG = "csrv_a-token-of-the-catalog"

_CONFIG = f"""
[[cache]]
name = "main"
root = true

[[cache]]
name = "open"

[[cache]]
name = "team"
prefix = "private/team"
public = false

[[token]]
name = "reader"
sha256 = "{token_hash(READER)}"
caches = ["team"]

[[token]]
name = "stranger"
sha256 = "{token_hash(STRANGER)}"
caches = ["main"]
"""

CACHES = ("main", "open", "team")
SMALL, MEDIUM, LARGE = 1000, 100_000, 2_000_000
"""Sizes of NARs, in bytes: the first two are small enough for the front."""


def hash_part(number: int) -> str:
    """Of the path with this number."""
    return base32.encode(sha256(b"path %d" % number).digest()[:20])


def narinfo(number: int) -> bytes:
    """A text of the size that narinfos have; nothing here reads it."""
    digest = base32.encode(sha256(b"nar %d" % number).digest())
    return (
        f"StorePath: /nix/store/{hash_part(number)}-path-{number}\nURL: nar/{digest}.nar.zst\nCompression: zstd\n"
        f"NarHash: sha256:{digest}\nNarSize: 1000\nReferences: \nSig: main-1:{'A' * 86}==\n"
    ).encode()


@cache
def nar(size: int) -> bytes:
    """Bytes of this number, the same each time."""
    return Random(size).randbytes(size)


PRESENT = tuple(map(hash_part, range(4)))
ABSENT = tuple(map(hash_part, range(100, 103)))
ENDED = hash_part(200)
"""An absence that is known no more."""
UNKNOWN = hash_part(300)
NARS = {f"{'0' * 51}{number}.nar.zst": size for number, size in enumerate((0, 1, SMALL, MEDIUM, LARGE))}


async def fill(services: Services) -> None:
    """The same content in each cache."""
    entries = [IndexEntry(cache, part, present(narinfo(n))) for cache in CACHES for n, part in enumerate(PRESENT)]
    services.index.put(entries)
    services.index.put_absent([(cache, part) for cache in CACHES for part in ABSENT], int(time.time()) + 3600)
    services.index.put_absent([(cache, ENDED) for cache in CACHES], int(time.time()) - 1)
    for prefix in ("main", "open", "private/team"):
        await services.storage.put_many({f"{prefix}/nar/{name}": nar(size) for name, size in NARS.items()})
    record = TokenRecord("later", token_hash(IN_CATALOG), ("t*",), ("pull",), int(time.time()), None, None)
    await services.catalog.put_token(record)


@asynccontextmanager
async def open_site(folder: Path, *, complete: bool = False) -> AsyncIterator[Site]:
    """A site that is filled. `complete`: it is known that the catalog knows all paths."""
    (folder / "cachesrv.toml").write_text(_CONFIG)
    (folder / "data" / "keys").mkdir(parents=True)
    loaded = config.load(folder / "cachesrv.toml", folder / "data", {})
    async with wiring.open_services(loaded, Metrics()) as services:
        await fill(services)
        site = Site(services, wiring.build_rules(wiring.declared(loaded), services.catalog, "http://cache.test"))
        if complete:
            assert not await services.completeness.find_out(site.rules.caches.values())
            for cache in site.rules.caches.values():
                assert await services.completeness.holds(cache)
        yield site


def counting_apart(site: Site) -> Site:
    """The same site, with counters of its own."""
    return Site(replace(site.services, metrics=Metrics()), site.rules)


def listening(send_buffer: int | None = None) -> socket.socket:
    """A socket on a free port; `send_buffer`: bytes that the kernel keeps of what a client does not take."""
    sock = socket.create_server(("127.0.0.1", 0), backlog=4096)
    if send_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    sock.setblocking(False)
    return sock


@dataclass(frozen=True)
class Served:
    """A server on `port`, and its connections."""

    port: int
    fronts: Fronts
    reactor: Reactor

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self.fronts) + len(self.reactor)

    @property
    def unsent(self) -> int:
        """Bytes that wait in the memory of this process, over all connections."""
        in_fronts = sum(front._transport.get_write_buffer_size() for front in self.fronts._open)
        return in_fronts + sum(len(found.unsent or b"") for found in self.reactor._connections.values())


@asynccontextmanager
async def front_server(
    site: Site,
    *,
    idle_timeout: float = IDLE_SECONDS,
    shutdown_timeout: float = 1,
    tls: ssl.SSLContext | None = None,
    send_buffer: int | None = None,
    by_reactor: bool = False,
) -> AsyncIterator[Served]:
    """The server as `cachesrv serve` runs it; plain TCP goes straight to the front unless it is `by_reactor`."""
    sock = listening(send_buffer)
    port: int = sock.getsockname()[1]
    options: dict[str, Any] = {"shutdown_timeout": shutdown_timeout, "idle_timeout": idle_timeout}
    options["by_reactor"] = by_reactor
    async with server.listening(site, [sock], tls=tls, **options) as (fronts, reactor):
        yield Served(port, fronts, reactor)


@asynccontextmanager
async def plain_server(site: Site) -> AsyncIterator[int]:
    """The same application behind aiohttp's own protocol; its port."""
    runner = web.AppRunner(create_app(site), **server.RUNNER_OPTIONS)
    await runner.setup()
    assert runner.server is not None
    sock = listening()
    port: int = sock.getsockname()[1]
    accepting = await asyncio.get_running_loop().create_server(runner.server, sock=sock)
    try:
        yield port
    finally:
        accepting.close()
        await runner.cleanup()


@contextmanager
def no_more_files(*, leave: int = 0) -> Iterator[None]:
    """As if as many files were open as this process may have, but for so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.open("/dev/null", os.O_RDONLY) for _ in range(leave + 1)]
    for descriptor in free:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
