"""Addresses to sockets."""

from __future__ import annotations

import socket
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import ConfigError
from cachesrv.web.listen import TcpAddress, UnixAddress, open_sockets, parse_address, url_of

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short name: those of sockets are limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="listen-") as folder:
        yield Path(folder)


def close(opened: list[list[socket.socket]]) -> None:
    for sock in (sock for share in opened for sock in share):
        sock.close()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:5000", TcpAddress("127.0.0.1", 5000)),
        ("localhost:0", TcpAddress("localhost", 0)),
        ("[::1]:5000", TcpAddress("::1", 5000)),
        (":5000", TcpAddress("", 5000)),
        ("5000", TcpAddress("", 5000)),
        ("host:65535", TcpAddress("host", 65535)),
        ("unix:/run/cachesrv", UnixAddress("/run/cachesrv")),
    ],
)
def test_addresses(text: str, address: TcpAddress | UnixAddress) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["", ":", "host:", "host", "host:x", "host:65536", "host:-1", "::1:5000", "host:٣", "unix:", "unix:relative"],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="listen"):
        parse_address(text)


@pytest.mark.parametrize("workers", [1, 3])
def test_each_worker_has_its_socket(workers: int) -> None:
    opened = open_sockets(["127.0.0.1:0", "127.0.0.1:0"], workers)
    try:
        assert len(opened) == workers
        names = {tuple(sock.getsockname() for sock in share) for share in opened}
        assert len(names) == 1, "all listen on the same addresses"
        assert len({*next(iter(names))}) == 2
        assert len({sock.fileno() for share in opened for sock in share}) == 2 * workers
        with socket.create_connection(opened[0][0].getsockname(), 10):
            pass
    finally:
        close(opened)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_address_that_is_taken(workers: int) -> None:
    """Also when several workers were to share it: a stranger is no worker."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        text = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"cannot listen on {text}: Address already in use"):
            open_sockets(["127.0.0.1:0", text], workers)


def test_nobody_takes_an_address_before_all_workers_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    truly = socket.socket.close
    stranger = socket.socket()

    def close_and_take(sock: socket.socket) -> None:
        bound = sock.getsockname()
        truly(sock)
        with suppress(OSError):
            stranger.bind(bound)

    with stranger, monkeypatch.context() as patched:
        patched.setattr(socket.socket, "close", close_and_take)
        opened = open_sockets(["127.0.0.1:0"], 2)
        patched.undo()
        close(opened)
        assert stranger.getsockname()[1] == 0


NOT_HERE = (socket.AF_INET6, ("2001:db8::1", 0, 0, 0))
"""An address that no machine has, as no address of IPv6 can be had where that is switched off."""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_host_with_an_address_that_this_machine_has_not(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    stands_for(monkeypatch, NOT_HERE, (socket.AF_INET, ("127.0.0.1", 0)))
    opened = open_sockets(["localhost:0"], workers)
    try:
        assert [[sock.family for sock in share] for share in opened] == [[socket.AF_INET]] * workers
    finally:
        close(opened)
    stands_for(monkeypatch, NOT_HERE)
    with pytest.raises(ConfigError, match="cannot listen on localhost:0: "):
        open_sockets(["localhost:0"], workers)


def test_what_is_open_already_is_closed_when_the_next_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nobody else is given ports of that address, so that what is free stays so.
    with socket.create_server(("127.0.0.1", 0)) as other, socket.create_server(("127.0.0.2", 0)) as free:
        address = free.getsockname()
        free.close()
        stands_for(monkeypatch, (socket.AF_INET, address), (socket.AF_INET, other.getsockname()))
        with pytest.raises(ConfigError, match="Address already in use"):
            open_sockets(["localhost:0"])
        socket.create_server(address).close()


def stands_for(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[int, tuple[object, ...]]) -> None:
    """Each host stands for these addresses."""
    found = [(family, socket.SOCK_STREAM, 6, "", where) for family, where in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


@pytest.mark.parametrize("host", ["host.invalid", "203.0.113.1", "a..b", "x" * 300, "xn--\u00e9"])
def test_hosts_that_are_not_ours(host: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        open_sockets([f"{host}:0"])


def test_sockets_in_the_file_system(folder: Path) -> None:
    """One that was left behind is replaced; one that is answered, or a file, is not."""
    path = folder / "socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    opened = open_sockets([f"unix:{path}"], 2)
    try:
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert [len(share) for share in opened] == [1, 1]
        assert url_of(opened[0][0], tls=False) == f"unix:{path}"
        with pytest.raises(ConfigError, match="cannot listen on"):
            open_sockets([f"unix:{path}"])
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    finally:
        close(opened)
    (folder / "file").write_text("precious")
    with pytest.raises(ConfigError, match="cannot listen on"):
        open_sockets([f"unix:{folder / 'file'}"])
    assert (folder / "file").read_text() == "precious"
    with pytest.raises(ConfigError, match="cannot listen on"):
        open_sockets([f"unix:{folder / ('x' * 200)}"])


@pytest.mark.parametrize(("address", "url"), [("127.0.0.1", "http://127.0.0.1:{}"), ("0.0.0.0", "http://127.0.0.1:{}")])
def test_urls(address: str, url: str) -> None:
    with socket.create_server((address, 0)) as sock:
        port = sock.getsockname()[1]
        assert url_of(sock, tls=False) == url.format(port)
        assert url_of(sock, tls=True) == url.format(port).replace("http:", "https:")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_urls_of_ipv6() -> None:
    opened = open_sockets(["[::]:0", "[::1]:0"])
    try:
        every, local = opened[0]
        assert url_of(every, tls=False) == f"http://[::1]:{every.getsockname()[1]}"
        assert url_of(local, tls=False) == f"http://[::1]:{local.getsockname()[1]}"
    finally:
        close(opened)
