"""What systemd gives to services: sockets that are open already, and a place to report to.

Sources: sd_listen_fds(3), sd_notify(3).
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING

from cachesrv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_FIRST_FD = 3


def inherited_sockets(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """The listening sockets that were passed by socket activation: see `inherited_descriptors`. Raises ConfigError for
    what is none.
    """
    sockets: list[socket.socket] = []
    try:
        sockets += (socket.socket(fileno=fd) for fd in inherited_descriptors(environ))
        listening = all(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for sock in sockets)
    except OSError:
        listening = False
    if not listening:
        for sock in sockets:
            sock.close()
        raise ConfigError("what systemd passed cannot be connected to: the socket unit needs ListenStream=, Accept=no")
    return sockets


def inherited_descriptors(environ: MutableMapping[str, str]) -> list[int]:
    """What was passed by socket activation, sockets or FIFOs; nothing when it is not for this process.

    The variables are taken out of `environ`, so that no child believes that they are for it.
    """
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    descriptors = list(range(_FIRST_FD, _FIRST_FD + int(count)))
    for fd in descriptors:
        os.set_inheritable(fd, False)
    return descriptors


def notify(state: str, environ: MutableMapping[str, str]) -> None:
    """Tell systemd, if it listens, e.g. `READY=1`, `RELOADING=1`, `STOPPING=1`, `STATUS=…`, `WATCHDOG=1`."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.sendall(state.encode())
        except OSError:
            return


def watchdog_interval(environ: MutableMapping[str, str]) -> float | None:
    """Seconds between two `WATCHDOG=1`, half of what systemd allows; None when there is no watchdog."""
    microseconds = environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdigit() or environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(microseconds) / 2_000_000


async def feed_watchdog(environ: MutableMapping[str, str]) -> None:
    """Tell systemd, until this is cancelled, that the event loop turns."""
    interval = watchdog_interval(environ)
    while interval:
        notify("WATCHDOG=1", environ)
        await asyncio.sleep(interval)
