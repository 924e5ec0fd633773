"""Where the server listens: addresses as people write them, to sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cachesrv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

BACKLOG = 4096


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """An empty host means every address of this machine."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket in the file system."""

    path: str


def parse_address(text: str) -> TcpAddress | UnixAddress:
    """`HOST:PORT`, `[IPv6]:PORT`, `:PORT`, `PORT` or `unix:PATH`. Raises ConfigError."""
    if text.startswith("unix:"):
        if not text.removeprefix("unix:").startswith("/"):
            raise ConfigError(f"listen = {text!r}: expected unix: and an absolute path")
        return UnixAddress(text.removeprefix("unix:"))
    host, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"listen = {text!r}: expected HOST:PORT, [IPv6]:PORT or unix:PATH")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"listen = {text!r}: an IPv6 address stands in brackets, as in [::1]:5000")
    return TcpAddress(host, int(port))


def open_sockets(addresses: Sequence[str]) -> list[socket.socket]:
    """Listening sockets for all of these. Raises ConfigError, that says which one and why."""
    sockets: list[socket.socket] = []
    try:
        for text in addresses:
            address = parse_address(text)
            sockets += _unix(address) if isinstance(address, UnixAddress) else _tcp(address)
    except OSError as error:
        for opened in sockets:
            opened.close()
        raise ConfigError(f"cannot listen on {text}: {error.strerror or error}") from error
    return sockets


def _tcp(address: TcpAddress) -> list[socket.socket]:
    found = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets = []
    for family, kind, protocol, _, where in dict.fromkeys(found):
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sockets.append(_listening(sock, where))
    return sockets


def _unix(address: UnixAddress) -> list[socket.socket]:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(Path(address.path).lstat().st_mode) and not _is_answered(address.path):
            Path(address.path).unlink()
    sock = _listening(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), address.path)
    os.chmod(address.path, 0o666)  # noqa: PTH101,S103  who may come in is decided by tokens, as on TCP
    return [sock]


def _is_answered(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == 0


def _listening(sock: socket.socket, where: object) -> socket.socket:
    try:
        sock.bind(where)  # type: ignore[arg-type]  # the form of an address depends on its family
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def url_of(sock: socket.socket, *, tls: bool) -> str:
    """A URL under which the socket can be reached from this machine."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  compared, not bound
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
