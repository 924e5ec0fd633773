"""Many connections to one server: those that only wait, and those that ask and never read."""

from __future__ import annotations

import resource
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import pytest

from cachesrv.index.base import IndexEntry
from cachesrv.index.lmdb import LmdbIndex
from cachesrv.services.answer import present
from cachesrv.services.data_directory import DataDirectory
from tests.front_site import PRESENT, narinfo
from tests.system.client import receive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.system.conftest import StartServer
    from tests.system.server import Server

MANY = 10_000
ANSWERED_BY_AIOHTTP = 1_000
HIT = f"GET /main/{PRESENT[0]}.narinfo HTTP/1.1\r\nHost: cache.test\r\n\r\n".encode()
SLOW = b"GET /nix-cache-info HTTP/1.1\r\nHost: cache.test\r\n\r\n"
MIB = 2**20


def resident(server: Server) -> int:
    """Bytes of memory that it holds, without the index, which is mapped (proc(5))."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


@pytest.fixture
def filled(make_server: StartServer) -> Server:
    """A server that has a path."""
    server = make_server()
    index = LmdbIndex(str(DataDirectory(server.data_dir).index))
    index.put([IndexEntry("main", PRESENT[0], present(narinfo(0)))])
    index.close()
    return server.start()


@pytest.fixture
def room_for_many() -> Iterator[None]:
    """Descriptors for both ends; each process has its own limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < MANY + 500:
        pytest.skip(f"this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def test_ten_thousand_idle_connections(filled: Server, room_for_many: None) -> None:
    with ExitStack() as stack:

        def connect(request: bytes = b"") -> socket.socket:
            connection = stack.enter_context(filled.client().connect())
            if request:
                connection.sendall(request)
                assert receive(connection).status == 200
            return connection

        for request in (HIT, SLOW):
            connect(request)
        before = resident(filled)
        connections = [connect(SLOW) for _ in range(ANSWERED_BY_AIOHTTP)]
        connections += [connect(HIT) for _ in range(MANY // 2)]
        connections += [connect() for _ in range(MANY - len(connections))]
        grown = resident(filled) - before
        assert min(seconds(lambda: connect(HIT)) for _ in range(5)) < 1
        for connection in connections[:: MANY // 50]:
            connection.sendall(HIT)
            assert receive(connection).body == narinfo(0)
        assert grown < 40 * MIB
    assert filled.client().get("/health/ready").status == 200
    assert filled.stop() == 0


def test_many_that_ask_and_never_read(filled: Server) -> None:
    nar = f"GET /main/nar/{'0' * 52}.nar HTTP/1.1\r\nHost: cache.test\r\n\r\n".encode()
    (filled.objects / "nar").mkdir(parents=True, exist_ok=True)
    (filled.objects / "nar" / f"{'0' * 52}.nar").write_bytes(bytes(400 * 1024))
    before = resident(filled)
    with ExitStack() as stack:
        for number in range(300):
            connection = socket.socket()
            stack.enter_context(connection)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((filled.client().host, filled.client().port))
            connection.settimeout(0.02)
            request = (HIT, HIT * 100, nar, nar * 20, SLOW * 100)[number % 5]
            try:
                for _ in range(100):
                    connection.sendall(request)
            except TimeoutError:
                continue

        def ask() -> None:
            assert filled.client().get(f"/main/{PRESENT[0]}.narinfo").body == narinfo(0)

        assert median(seconds(ask) for _ in range(20)) < 1
        assert resident(filled) - before < 100 * MIB
