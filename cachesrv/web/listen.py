"""Where the server listens: addresses as people write them, to sockets."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cachesrv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BACKLOG = 4096
STALLED_SECONDS = 900
"""How long a client may take nothing of what it was sent: Nix itself pauses while it waits for its own disk."""

_NOT_HERE = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})


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


def open_sockets(addresses: Sequence[str], workers: int = 1) -> list[list[socket.socket]]:
    """Listening sockets on all of these, for each worker. With several workers each has its own on a TCP address; one
    in the file system is shared. Raises ConfigError, that says which one and why.
    """
    opened: list[list[socket.socket]] = []
    for text in addresses:
        address = parse_address(text)
        try:
            # Those that come before an error are in the list as well.
            opened += _unix(address, workers) if isinstance(address, UnixAddress) else _tcp(address, workers)
        except (OSError, UnicodeError) as error:
            for sock in (sock for shares in opened for sock in shares):
                sock.close()
            raise ConfigError(f"cannot listen on {text}: {_reason(error)}") from error
    return [list(share) for share in zip(*opened, strict=True)]


def _reason(error: OSError | UnicodeError) -> str:
    if isinstance(error, UnicodeError):
        return "no host can have this name"
    return error.strerror or str(error)


def _tcp(address: TcpAddress, workers: int) -> Iterator[list[socket.socket]]:
    """For each address that the host stands for, a socket a worker; those that this machine has not are left out, as
    long as there is another one: names stand for IPv6 addresses also where IPv6 is switched off.
    """
    found = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = dict.fromkeys((family, where) for family, _, _, _, where in found)
    left_out: list[OSError] = []
    for family, where in addresses:
        try:
            first = _bound(family, where, share=False)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            left_out.append(error)
            continue
        if workers > 1:
            # The first one was not shared, to find out whether somebody else is there. It keeps the port, which may
            # have been given to it, until the others have it.
            with first:
                first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                shares = [_bound(family, first.getsockname(), share=True) for _ in range(workers)]
            yield shares
        else:
            yield [first]
    if len(left_out) == len(addresses):
        raise left_out[0]


def _bound(family: int, where: object, *, share: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if share:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return _listening(sock, where)


def _unix(address: UnixAddress, workers: int) -> list[list[socket.socket]]:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(Path(address.path).lstat().st_mode) and not _is_answered(address.path):
            Path(address.path).unlink()
    sock = _listening(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), address.path)
    os.chmod(address.path, 0o666)  # noqa: PTH101,S103  who may come in is decided by tokens, as on TCP
    return [[sock] * workers]


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


def end_stalls(sock: socket.socket) -> None:
    """Have the kernel end connections whose client takes nothing any more. Inherited by those that are accepted.
    Source: tcp(7).
    """
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_SECONDS * 1000)


def url_of(sock: socket.socket, *, tls: bool) -> str:
    """A URL under which the socket can be reached from this machine."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  compared, not bound
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
