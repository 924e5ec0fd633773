"""How connections come in that asyncio gets at once: those under TLS, and those of sockets in the file system."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from typing import TYPE_CHECKING

import pytest
import structlog

from cachesrv.web import accepting
from cachesrv.web.accepting import Accepting
from tests import certificate
from tests.front_site import no_more_files

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator
    from pathlib import Path


class Echo(asyncio.Protocol):
    """Answers with what it is sent."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


@pytest.fixture
def path() -> Iterator[str]:
    """Of a socket, and short: it has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="accept-") as folder:
        yield f"{folder}/socket"


@pytest.fixture
def told() -> Iterator[list[object]]:
    """What asyncio has to say of the connections of a test: nothing."""
    found: list[object] = []
    yield found
    assert not found


def listening(path: str, told: list[object]) -> socket.socket:
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen(100)
    return sock


def connected(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    client.setblocking(False)
    return client


async def asked(client: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client, b"hello")
    async with asyncio.timeout(30):
        return await loop.sock_recv(client, 100)


async def turns(number: int = 5) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def test_what_does_not_fit_among_the_open_files_waits(
    path: str, told: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepting, "PAUSE", 0.05)
    door = Accepting(Echo, None)
    door.start([listening(path, told)])
    clients = [connected(path) for _ in range(3)]
    with structlog.testing.capture_logs() as logs, no_more_files():
        await turns()
    assert [log["event"] for log in logs] == ["no new connections for a moment"]
    for client in clients:
        assert await asked(client) == b"hello"
        client.close()
    await door.stop()
    await turns()


async def test_the_end_comes_also_while_no_connections_are_accepted(path: str, told: list[object]) -> None:
    door = Accepting(Echo, None)
    door.start([listening(path, told), listening(f"{path}-2", told)])
    client = connected(path)
    with no_more_files():
        await turns()
        await door.stop()
    with pytest.raises(ConnectionError):
        await asked(client)
    client.close()
    with pytest.raises(ConnectionRefusedError):
        connected(f"{path}-2")


async def test_who_came_before_the_end_is_let_in(path: str, told: list[object]) -> None:
    door = Accepting(Echo, None)
    door.start([listening(path, told)])
    client = connected(path)
    await door.stop()
    assert await asked(client) == b"hello"
    client.close()
    await turns()


async def test_who_does_not_speak_tls_is_no_defect(path: str, told: list[object], tmp_path: Path) -> None:
    server, trusting = certificate.contexts(tmp_path)
    door = Accepting(Echo, server)
    door.start([listening(path, told)])
    plain, gone = connected(path), connected(path)
    gone.close()
    assert not (await asked(plain)).startswith(b"hello")
    plain.close()
    assert await echo_under_tls(path, trusting) == b"hello"
    await door.stop()
    await turns()


async def echo_under_tls(path: str, trusting: ssl.SSLContext) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path, ssl=trusting, server_hostname="localhost")
    writer.write(b"hello")
    received = await reader.readexactly(5)
    writer.close()
    await writer.wait_closed()
    return received
